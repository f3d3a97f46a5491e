"""Make of a graph, before and after, the few boxes that a person wants to see.

    to → pow → mean → add → rsqrt → mul → to → mul      ──►      input_layernorm: 8 operations

Shown one by one: projections, Amber's operators, what a pass changed, and operators that are
worth a look (attention, matmuls, convolutions, embeddings). The rest is merged along its edges,
within a module and as long as no cycle arises. Left out: parameters and whatever is no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amber_compile.sketch import INPUTS, Sketch, SketchNode, renamed

from .boxes import Box, Pair, boxes_of, is_amber

if TYPE_CHECKING:
    from networkx import DiGraph

WORTH_A_LOOK = ("attention", "embedding", "mm", "conv", "softmax", "einsum", "matmul", "scan")
"""Parts of the names of operators that are never merged."""

Edge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Scene:
    """Boxes by their keys, and the edges between them, on both sides; None is absent."""

    boxes: dict[str, tuple[Box | None, Box | None]]
    edges: tuple[frozenset[Edge], frozenset[Edge]]

    @property
    def has_cycle(self) -> bool:
        """Whether the two sides do not fit into one order: a pass turned something around."""
        import networkx

        both = networkx.DiGraph([*self.edges[0], *self.edges[1]])
        return not networkx.is_directed_acyclic_graph(both)


def scene_of(before: Sketch, after: Sketch, within: str = "") -> Scene:
    """Return the boxes of a graph on both sides of a pass; names start below ``within``."""
    after = _as_before(before, after)
    sides = [{node.name: node for node in sketch} for sketch in (before, after)]
    names = list(dict.fromkeys([*_in_order(before, after)]))
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in names}
    shown = {name: pair for name, pair in pairs.items() if _is_shown(pair)}
    shown |= {name: (one, one) for name, one in _outside(before, after, pairs).items()}
    edges = [_edges(side, shown) for side in sides]
    group = _merge(shown, edges[0] | edges[1])
    members: dict[str, list[str]] = {}
    for name in shown:
        members.setdefault(group[name], []).append(name)
    boxes = {
        key: boxes_of([shown[name] for name in own], sides, within) for key, own in members.items()
    }
    joined = [{(group[a], group[b]) for a, b in one if group[a] != group[b]} for one in edges]
    return Scene(boxes, (frozenset(joined[0]), frozenset(joined[1])))


# ---- nodes ---------------------------------------------------------------------------------------


def _as_before(before: Sketch, after: Sketch) -> Sketch:
    """Return ``after`` with the names of ``before`` for projections that were made anew."""
    held = {node.name for node in before}
    kept = {node.name for node in after}
    gone = {node.site: node.name for node in before if node.site and node.name not in kept}
    anew = {
        node.name: gone[node.site]
        for node in after
        if node.site in gone and node.name not in held and node.site
    }
    if not anew:
        return after
    return tuple(
        node._replace(
            name=anew.get(node.name, node.name),
            inputs=tuple([anew.get(one, one) for one in node.inputs]),
            arguments=renamed(node.arguments, anew),
        )
        for node in after
    )


def _in_order(before: Sketch, after: Sketch) -> Iterable[str]:
    """Yield the names of both in one order of execution."""
    later = {node.name for node in after}
    gone = [node.name for node in before if node.name not in later]
    yield from gone if not after else ()
    places = {node.name: at for at, node in enumerate(before)}
    waiting = [node.name for node in before if node.name not in later] if after else []
    for node in after:
        while waiting and places.get(node.name, -1) > places[waiting[0]]:
            yield waiting.pop(0)
        yield node.name
    yield from waiting


def _is_shown(pair: Pair) -> bool:
    node = pair[1] or pair[0]
    assert node is not None, "a name is of one side at least"
    if node.op == "output" or (not node.value and not is_amber(node)):
        return False
    return node.op not in INPUTS or not node.module


def _outside(before: Sketch, after: Sketch, known: Iterable[str]) -> dict[str, SketchNode]:
    """Return a stand-in for each node of another layer that is read."""
    held = set(known)
    read = dict.fromkeys(name for node in (*before, *after) for name in node.inputs)
    return {
        name: SketchNode(name, "placeholder", re.sub(r"_\d+$", "", name))
        for name in read
        if name not in held
    }


def in_order(edges: Iterable[Edge], keys: Iterable[str]) -> list[Edge]:
    """Return ``edges`` sorted by the places of their ends among ``keys``."""
    places = {key: at for at, key in enumerate(keys)}
    return sorted(edges, key=lambda edge: (places[edge[0]], places[edge[1]]))


def _edges(side: dict[str, SketchNode], shown: Iterable[str]) -> set[Edge]:
    names = set(shown)
    return {
        (one, node.name)
        for node in side.values()
        if node.name in names
        for one in node.inputs
        if one in names
    }


# ---- merging -------------------------------------------------------------------------------------


def _merge(shown: dict[str, Pair], edges: set[Edge]) -> dict[str, str]:
    """Return the group that each node belongs to, by the name of one of them."""
    import networkx  # brought by PyTorch, and not needed to compile

    graph: DiGraph = networkx.DiGraph()
    graph.add_nodes_from(shown)
    graph.add_edges_from(in_order(edges, shown))
    group = {name: name for name in shown}
    boring = {name: pair[0].module for name, pair in shown.items() if pair[0] and _is_boring(pair)}
    if not networkx.is_directed_acyclic_graph(graph):
        return group
    merged = True
    while merged:
        merged = False
        for one, other in list(networkx.topological_sort(networkx.line_graph(graph))):
            if (one, other) not in graph.edges or one not in boring or other not in boring:
                continue
            if boring[one] == boring[other] and not _is_linked_twice(graph, one, other):
                networkx.contracted_nodes(graph, one, other, self_loops=False, copy=False)
                group = {name: one if at == other else at for name, at in group.items()}
                merged = True
    return group


def _is_linked_twice(graph: DiGraph, one: str, other: str) -> bool:
    """Whether a path leads from ``one`` to ``other`` besides the edge: merging would close it."""
    import networkx

    return any(networkx.has_path(graph, step, other) for step in graph[one] if step != other)


def _is_boring(pair: Pair) -> bool:
    old, new = pair
    if old is None or old != new or old.site or is_amber(old) or old.op in INPUTS:
        return False
    return not any(part in old.target for part in WORTH_A_LOOK)
