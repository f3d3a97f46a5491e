"""The graphs of a report for its page: drawings and diffs of every layer, each kept once.

The layers of a model give few different drawings, whatever their number, and layers compiled one by
one share a graph: such a layer shows that of the first layer with the same projections sparse.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amber_compile.report import GraphReport, Report
from amber_compile.sketch import (
    INPUTS,
    Sketch,
    SketchNode,
    Stage,
    by_layer,
    diff,
    layer_path,
    renamed,
)

from .drawing import draw_pair

BUDGET = 2_500_000
"""Characters of diffs and drawings that a page holds; later ones are left out, and said so."""
LEFT_OUT = "Left out to keep the page small: amber_compile.sketch.diff shows it."

Step = dict[str, Any]


def graphs_of(report: Report) -> dict[str, Any]:
    """Return ``graphs``, each with the steps of each layer, and the ``texts`` that steps name.

    Of a layer that shares a graph, the steps are the name of the layer that has them.
    """
    texts = _Texts()
    graphs = [_graph(at, graph, texts) for at, graph in enumerate(report.graphs, start=1)]
    return {"graphs": graphs, "texts": list(texts.places)}


class _Texts:
    """Texts by number, each kept once; and the drawings of what was drawn before."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.drawn: dict[tuple[Sketch, Sketch], tuple[str, str]] = {}
        self._size = 0

    def add(self, text: str) -> int:
        """Return the number of ``text``, or of a remark where there is no room for it."""
        if text not in self.places and self._size + len(text) > BUDGET:
            text = LEFT_OUT
        self._size += len(text) if text not in self.places else 0
        return self.places.setdefault(text, len(self.places))


def _graph(at: int, graph: GraphReport, texts: _Texts) -> dict[str, Any]:
    views: dict[str, list[Step]] = {}
    for variant in _variants(graph.stages):
        for name, steps in _views(variant, texts).items():
            views.setdefault(name, steps)
    shared = _shared(graph, views)
    order = [name for name in [*views, *shared] if name] + [""] * ("" in views)
    return {"name": f"Graph {at}, {graph.phase}", "views": {**views, **shared}, "order": order}


def _variants(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Yield the stages of each variant of a graph: each begins with ``traced``."""
    variant: list[Stage] = []
    for stage in stages:
        if stage.name == "traced" and variant:
            yield variant
            variant = []
        variant.append(stage)
    if variant:
        yield variant


def _views(variant: Sequence[Stage], texts: _Texts) -> dict[str, list[Step]]:
    """Return for each layer what every pass made of it; of a graph left alone one picture."""
    split = [(stage.name, by_layer(stage.sketch)) for stage in variant]
    pairs = list(itertools.pairwise(split)) or [(split[0], split[0])]
    return {
        name: [
            _step(name, old, new, before.get(name, ()), after.get(name, ()), texts)
            for (old, before), (new, after) in pairs
        ]
        for name, nodes in split[-1][1].items()
        if name or any(node.value for node in nodes)  # and not the output alone
    }


def _step(name: str, old: str, new: str, before: Sketch, after: Sketch, texts: _Texts) -> Step:
    pair = _general(before, after, name)
    drawings = texts.drawn.get(pair) or draw_pair(*pair)
    texts.drawn[pair] = drawings
    changed = set(after) - set(before)
    return {
        "names": [old, new],
        "drawings": [texts.add(drawing) for drawing in drawings],
        "diff": texts.add(diff(before, after, within=name)) if changed else None,
        "changed": len([node for node in changed if node.op not in INPUTS]),
    }


def _shared(graph: GraphReport, views: Mapping[str, list[Step]]) -> dict[str, Any]:
    """Return, for layers that have no view, the name of a layer that ran the same variant."""
    sparse: dict[str, set[tuple[str, bool]]] = {}
    for site in graph.sites:
        name = layer_path(site.name)
        leaf = site.name.removeprefix(name)
        sparse.setdefault(name, set()).add((leaf, site.decision.sparse))
    return {
        name: twin
        for name, own in sparse.items()
        if name not in views
        for twin in [next((one for one in views if sparse.get(one) == own), None)]
        if twin is not None
    }


# ---- the same drawing for the same structure -----------------------------------------------------


def _general(before: Sketch, after: Sketch, layer: str) -> tuple[Sketch, Sketch]:
    """Return both with names that do not tell one layer from another."""
    names: dict[str, str] = {}
    own = {node.name for node in (*before, *after)}
    for node in (*before, *after):
        for name in (*node.inputs, node.name):
            base = "node" if name in own else re.sub(r"_\d+$", "", name)
            names.setdefault(name, f"{base}_{len(names)}")
    start = f"{layer}." if layer else ""
    first, second = (
        tuple(_renamed(node, names, start) for node in sketch) for sketch in (before, after)
    )
    return first, second


def _renamed(node: SketchNode, names: Mapping[str, str], start: str) -> SketchNode:
    return node._replace(
        name=names[node.name],
        target=node.target.removeprefix(start),
        inputs=tuple([names[one] for one in node.inputs]),
        site=node.site.removeprefix(start),
        module=f"{node.module}.".removeprefix(start),
        arguments=renamed(node.arguments, names),
    )
