"""Place the boxes of a graph in rows, by the method of Sugiyama, Tagawa and Toda (1981).

    rank        length of the longest way from a source; a source stands close to its reader
    bend        a point in each row that an edge crosses
    order       within a row, by the mean place of the neighbours, down and up a few times
    place       as near to the neighbours as the order and the widths allow: least squares, solved
                exactly for a row by pooling adjacent violators

One layout everywhere, with nothing to install: Graphviz's ``dot`` would give other pictures on
other machines. networkx does the graph theory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from networkx import DiGraph

SWEEPS = 12
"""How often the rows are gone through, for the order and for the places."""
GAP = 24.0
"""Between two boxes of a row, in pixels."""
BEND_WIDTH = 8.0
"""Room for an edge that passes between two boxes."""
STIFF = 2.0
"""How much harder an edge is to push aside than a box."""
PASSING = 0.001
"""How much nearer a box wants to be to a box than to an edge that comes from afar."""

Key = Any  # a box's key, or (from, to, rank) of a bend
Edge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """Centres of boxes, rows of boxes, and the bends of edges.

    Attributes:
        x: horizontal centre of every box.
        rank: its row, from 0.
        bends: for each edge the centre of its way through each row between its ends.
        width: of all.
        rows: their number.
    """

    x: dict[str, float]
    rank: dict[str, int]
    bends: dict[Edge, list[float]]
    width: float
    rows: int


def layout_of(widths: Mapping[str, float], edges: Iterable[Edge]) -> Layout:
    """Place boxes of the given widths; ``edges`` form no cycle."""
    import networkx  # brought by PyTorch, and not needed to compile

    graph: DiGraph = networkx.DiGraph()
    graph.add_nodes_from(widths)
    graph.add_edges_from(edges)
    rank = _ranks(graph)
    bent = _bend(graph, rank)
    rows: list[list[Key]] = [[] for _ in range(1 + max(rank.values(), default=-1))]
    for key in networkx.lexicographical_topological_sort(bent, key=_sort_key(widths)):
        rows[bent.nodes[key]["rank"]].append(key)
    _order(bent, rows)
    room = {
        key: widths.get(key, BEND_WIDTH) if isinstance(key, str) else BEND_WIDTH for key in bent
    }
    x = _places(bent, rows, room)
    left = min((x[key] - room[key] / 2 for key in x), default=0.0)
    width = max((x[key] + room[key] / 2 for key in x), default=0.0) - left
    bends = {
        (a, b): [x[(a, b, at)] - left for at in range(rank[a] + 1, rank[b])] for a, b in graph.edges
    }
    return Layout({key: x[key] - left for key in widths}, rank, bends, width, len(rows))


def _sort_key(widths: Mapping[str, float]) -> Any:
    places = {key: at for at, key in enumerate(widths)}
    return lambda key: places[key if isinstance(key, str) else key[1]]


def _ranks(graph: DiGraph) -> dict[str, int]:
    import networkx

    rank = {
        key: at for at, row in enumerate(networkx.topological_generations(graph)) for key in row
    }
    for key in graph:
        if not graph.in_degree(key) and graph.out_degree(key):
            rank[key] = min(rank[reader] for reader in graph[key]) - 1
    return rank


def _bend(graph: DiGraph, rank: Mapping[str, int]) -> DiGraph:
    """Return ``graph`` with a chain of bends for each edge that crosses rows."""
    bent = type(graph)()
    for key in graph:
        bent.add_node(key, rank=rank[key])
    for a, b in graph.edges:
        chain: list[Key] = [a, *((a, b, at) for at in range(rank[a] + 1, rank[b])), b]
        for bend in chain[1:-1]:
            bent.add_node(bend, rank=bend[2])
        bent.add_edges_from(itertools.pairwise(chain))
    return bent


def _order(graph: DiGraph, rows: list[list[Key]]) -> None:
    """Sort each row by the mean place of its neighbours in the row before; the best order stays."""
    best, least = [list(row) for row in rows], _crossings(graph, rows)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = graph.pred if down else graph.succ
        pairs = itertools.pairwise(rows) if down else zip(rows[::-1], rows[-2::-1], strict=False)
        for fixed, row in pairs:
            places = {key: at for at, key in enumerate(fixed)}
            mean = {
                key: _mean([places[one] for one in neighbours[key]], at)
                for at, key in enumerate(row)
            }
            row.sort(key=mean.__getitem__)
        count = _crossings(graph, rows)
        if count < least:
            best, least = [list(row) for row in rows], count
    rows[:] = best


def _crossings(graph: DiGraph, rows: Sequence[Sequence[Key]]) -> int:
    count = 0
    for row, below in itertools.pairwise(rows):
        places = {key: at for at, key in enumerate(below)}
        ends = [sorted(places[one] for one in graph[key]) for key in row]
        flat = [place for own in ends for place in own]
        count += sum(a > b for at, a in enumerate(flat) for b in flat[at + 1 :])
    return count


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _places(
    graph: DiGraph, rows: Sequence[Sequence[Key]], room: Mapping[Key, float]
) -> dict[Key, float]:
    """Return the centre of everything: each row in turn as near to its neighbours as it can be."""
    x: dict[Key, float] = {}
    for row in rows:
        _settle(row, [0.0] * len(row), room, x)
    bends: dict[Edge, list[Key]] = {}
    for key in filter(_is_bend, graph):
        bends.setdefault(key[:2], []).append(key)
    for sweep in range(2 * SWEEPS + 1):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            wanted = [
                _straight(key, bends[key[:2]], x) if _is_bend(key) else _near(key, graph, down, x)
                for key in row
            ]
            _settle(row, wanted, room, x)
    for (one, other), own in [*bends.items()] * 2:  # one that moves makes room for another
        _straighten(own, (x[one] + x[other]) / 2, rows, room, x)
    return x


def _straighten(
    bends: Sequence[Key],
    wanted: float,
    rows: Sequence[Sequence[Key]],
    room: Mapping[Key, float],
    x: dict[Key, float],
) -> None:
    """Put the bends of an edge on one vertical line, near ``wanted``, if the rows leave one."""
    low, high = -float("inf"), float("inf")
    for key in bends:
        row = rows[key[2]]
        at = row.index(key)
        if at > 0:
            low = max(low, x[row[at - 1]] + (room[row[at - 1]] + room[key]) / 2 + GAP)
        if at + 1 < len(row):
            high = min(high, x[row[at + 1]] - (room[row[at + 1]] + room[key]) / 2 - GAP)
    if low <= high:
        x |= dict.fromkeys(bends, min(max(wanted, low), high))


def _is_bend(key: Key) -> bool:
    return not isinstance(key, str)


def _straight(key: Key, bends: Sequence[Key], x: Mapping[Key, float]) -> float:
    """Return where a bend wants to be: in line with the others of its edge, near its ends."""
    ends = (x[key[0]] + x[key[1]]) / 2
    return 0.95 * _mean([x[one] for one in bends], ends) + 0.05 * ends


def _near(key: Key, graph: DiGraph, down: bool, x: Mapping[Key, float]) -> float:
    """Return where a box wants to be: below what it reads, or above what reads it.

    Boxes on the way count more than sources, which come along, and than edges from afar.
    """
    near = list(graph.pred[key] if down else graph.succ[key]) or list(graph.succ[key])
    weights = [PASSING if _is_bend(one) or not graph.pred[one] else 1.0 for one in near]
    total = sum(weights)
    pairs = zip(weights, near, strict=True)
    return sum(weight * x[one] for weight, one in pairs) / total if total else x[key]


def _settle(
    row: Sequence[Key],
    wanted: Sequence[float],
    room: Mapping[Key, float],
    x: dict[Key, float],
) -> None:
    """Place ``row`` in its order without overlaps, as near to ``wanted`` as that allows."""
    offsets = [0.0]
    for one, other in itertools.pairwise(row):
        offsets.append(offsets[-1] + (room[one] + room[other]) / 2 + GAP)
    blocks: list[tuple[float, float, int]] = []  # of what touches: mean place, weight, number
    for key, want, offset in zip(row, wanted, offsets, strict=True):
        mean, weight, count = want - offset, STIFF if _is_bend(key) else 1.0, 1
        while blocks and blocks[-1][0] >= mean:
            left, other, more = blocks.pop()
            mean = (left * other + mean * weight) / (other + weight)
            weight, count = weight + other, count + more
        blocks.append((mean, weight, count))
    base = [mean for mean, _, count in blocks for _ in range(count)]
    for key, place, offset in zip(row, base, offsets, strict=False):
        x[key] = place + offset
