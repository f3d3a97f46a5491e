"""What is written on a box of a drawing.

    q_proj                  the projection's name          nm_select                 the operator
    linear 4096×4096        operator, weight               2:4 · norm correction     its selection

    input_layernorm: 8 ops  a module, how many merged      silu                      the operator
    to · pow · mean +3      what they are                  bf16[1, s0, 14336]        its result

Boxes hold no node names, so that the layers of a model give few different drawings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from amber_compile.sketch import INPUTS, SketchNode

TIMES = "\N{MULTIPLICATION SIGN}"
NAMED = 3
"""How many operators the text of a merged box names."""

Pair = tuple[SketchNode | None, SketchNode | None]
"""A node before and after a pass; None is absent."""


@dataclass(frozen=True, slots=True)
class Box:
    """What is drawn as one.

    Attributes:
        kind: ``dense`` or ``sparse`` for projections, ``amber``, ``input``, ``other``.
        title: its first line.
        detail: its second line, or "".
        state: ``new``, ``changed``, ``removed`` or "".
        site: name of the projection below the layer, or "".
    """

    kind: str
    title: str
    detail: str = ""
    state: str = ""
    site: str = ""


def boxes_of(
    pairs: Sequence[Pair], sides: Sequence[dict[str, SketchNode]], within: str
) -> tuple[Box | None, Box | None]:
    """Return the box of some nodes on each side; None where there is none of them."""
    if len(pairs) > 1:
        box = _merged([pair[0] for pair in pairs if pair[0]])
        return box, box
    old, new = pairs[0]
    return (
        None if old is None else _box(old, sides[0], within, _state(old, new, "removed")),
        None if new is None else _box(new, sides[1], within, _state(new, old, "new")),
    )


def _state(node: SketchNode, other: SketchNode | None, alone: str) -> str:
    return alone if other is None else "" if node == other else "changed"


def _box(node: SketchNode, side: dict[str, SketchNode], within: str, state: str) -> Box:
    if node.op in INPUTS:
        return Box("input", node.target.removeprefix(f"{within}.") if within else node.target)
    if is_amber(node) and not node.site:
        return Box("amber", node.target.removeprefix("amber."), _selection(node), state)
    if not node.site:
        return Box("other", node.target, node.value, state)
    site = node.site.removeprefix(f"{within}.") if within else node.site
    sparse = is_amber(node) or _reads_amber(node, side)
    detail = " ".join(filter(None, [node.target, _weight(node, side)]))
    return Box("sparse" if sparse else "dense", site.rpartition(".")[2], detail, state, site)


def _merged(nodes: Sequence[SketchNode]) -> Box:
    targets = list(dict.fromkeys(node.target.strip("_") for node in nodes))
    more = f" +{len(targets) - NAMED}" if len(targets) > NAMED else ""
    name = nodes[0].module.rstrip(".").rpartition(".")[2] or "graph"
    return Box("other", f"{name}: {len(nodes)} ops", " · ".join(targets[:NAMED]) + more)


def _selection(node: SketchNode) -> str:
    """Return the pattern and the correction among the arguments of an operator of Amber's."""
    found = re.search(r"\b(\d+), (\d+)(?:, '(\w+)')?", node.arguments)
    if not found:
        return node.value
    return f"{found[1]}:{found[2]}" + (f" · {found[3]} correction" if found[3] else "")


def _reads_amber(node: SketchNode, side: dict[str, SketchNode]) -> bool:
    """Whether the input of a projection is a selection, or a view of one."""
    first = next((side[one] for one in node.inputs if one in side), None)
    if first is not None and first.target.startswith("view") and first.inputs[0] in side:
        first = side[first.inputs[0]]
    return first is not None and is_amber(first)


def _weight(node: SketchNode, side: dict[str, SketchNode]) -> str:
    """Return the sizes of the weight of a projection: ``64×64``."""
    held = [side[one].value for one in node.inputs if one in side and side[one].op in INPUTS]
    found = [
        match[1] for match in (re.search(r"\[([^\]]+, [^\]]+)\]", one) for one in held) if match
    ]
    return found[0].replace(", ", TIMES) if found else ""


def is_amber(node: SketchNode) -> bool:
    """Whether a pass of Amber's inserted an operator of its own here."""
    return node.target.startswith("amber.")
