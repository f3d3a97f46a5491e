"""Take down what a graph looked like at each stage of its compilation.

    traced  ──►  sparsify_projections  ──►  …        one sketch after each pass that changed it

A node that a pass left alone is sketched once: ``is`` tells what changed. A graph that layers share
is taken down once for each of its variants, under the names of the first layer that the variant is
for: each ``traced`` in a report begins a variant. Dense graphs are taken down too, decode among
them: 20 to 30 ms for 2,500 nodes, where Inductor takes a minute. What Inductor generates may be
megabytes and is not copied: only where it lies is remembered.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._dtype_abbrs import dtype_abbrs

from .analysis import Analysis, Names
from .naming import module_path, parameter_path
from .projection import Projection, value_of
from .report import GraphReport
from .sketch import INPUTS, Sketch, SketchNode, Stage

HELD = ("_modules[", "_parameters[", "_buffers[")
"""Steps by which Dynamo reads what a module holds."""
LONGEST = 400
"""Characters of a node's arguments that are kept: a graph may hold a table of constants."""


class Stages:
    """The stages of one variant of a graph.

    Args:
        analysis: of the graph.
        names: the projections' qualified names for the layer, or model, that the variant is for.
        report: of the graph; the stages go there.
    """

    def __init__(self, analysis: Analysis, names: Names, report: GraphReport) -> None:
        local = [projection.name for projection in analysis.projections]
        self._names = dict(zip(local, names, strict=True))
        self._prefix = _prefix(local, names)
        self._report = report
        self._weights = {one.weight.name: self._names[one.name] for one in analysis.projections}
        self._last: Sketch = ()
        self.take("traced", analysis.gm, [(one, one.x) for one in analysis.projections])

    def take(self, name: str, gm: GraphModule, sites: Sequence[tuple[Projection, Node]]) -> None:
        """Add the graph as it is now, if it changed; ``sites`` are its new or moved projections."""
        named = {one.node: self._names[one.name] for one, _ in sites} | self._fused(gm)
        sketch = sketch_of(gm, named, self._prefix, self._last)
        changed = len(sketch) != len(self._last) or any(
            new is not old for new, old in zip(sketch, self._last, strict=True)
        )
        if changed:
            self._report.stages.append(Stage.of(name, sketch))
            self._last = sketch

    def _fused(self, gm: GraphModule) -> dict[Node, str]:
        """Name Amber's operators that multiply by a weight, whole or a part of it."""
        found = {}
        for node in gm.graph.nodes:
            if getattr(node.target, "namespace", None) == "amber":
                read = [one for operand in node.all_input_nodes for one in _or_whole(operand)]
                names = [self._weights[one.name] for one in read if one.name in self._weights]
                if names:
                    found[node] = names[0]
        return found


def _or_whole(operand: Node) -> Sequence[Node]:
    """Return an operand and, if it is a part of something, that."""
    return (operand, *operand.all_input_nodes) if operand.target is operator.getitem else (operand,)


@contextlib.contextmanager
def code_recorded(report: GraphReport) -> Iterator[None]:
    """Remember the files of the code that Inductor generates, or finds in its cache, meanwhile."""
    before = len(_generated())
    yield
    report.code_files += [
        str(module.__file__) for module in _generated()[before:] if hasattr(module, "call")
    ]


def _generated() -> Sequence[ModuleType]:
    """Return the modules that Inductor has loaded, without importing it."""
    cache: Any = getattr(sys.modules.get("torch._inductor.codecache"), "PyCodeCache", None)
    return cache.modules if cache is not None else ()


def _prefix(local: Sequence[str], names: Names) -> str:
    """Return what qualified names have before the names in the graph: ``model.layers.0.``."""
    pairs = zip(names, local, strict=True)
    return next((full.removesuffix(name) for full, name in pairs if full != name), "")


# ---- sketches ------------------------------------------------------------------------------------


def sketch_of(
    gm: GraphModule, sites: Mapping[Node, str], prefix: str = "", like: Sketch = ()
) -> Sketch:
    """Sketch the graph of ``gm``.

    Args:
        gm: a Dynamo or export graph.
        sites: qualified names of its projections.
        prefix: what the graph's own module paths lack, such as ``model.layers.0.``.
        like: an earlier sketch of it: nodes that did not change since are taken from there.
    """
    known = {node.name: node for node in like}
    values = _Values()
    return tuple(_sketch(node, known, sites, prefix, values) for node in gm.graph.nodes)


def _sketch(
    node: Node,
    known: Mapping[str, SketchNode],
    sites: Mapping[Node, str],
    prefix: str,
    values: _Values,
) -> SketchNode:
    arguments = _arguments(node)
    old = known.get(node.name)
    if old is not None and old.op == node.op and old.arguments == arguments:
        return old
    value = values.text(value_of(node))
    target, module = _input(node, value, prefix) if node.op in INPUTS else _call(node, prefix)
    return SketchNode(
        node.name,
        node.op,
        target,
        tuple([one.name for one in node.all_input_nodes]),
        value,
        sites.get(node, "") or (old.site if old else ""),
        arguments,
        module,
    )


def _call(node: Node, prefix: str) -> tuple[str, str]:
    path = module_path(node)
    return _target(node.target), prefix + path if path else ""


def _input(node: Node, value: str, prefix: str) -> tuple[str, str]:
    """Return the path of an input and of the module that holds it; "" if it is given."""
    if not value:  # a symbolic size is an input too, and known by its name
        return node.name, ""
    path = parameter_path(node)
    if not path:
        return node.name, "amber" if node.name.startswith("amber_") else ""
    source = str(getattr(getattr(node, "_dynamo_source", None), "name", ""))
    is_held = node.op == "get_attr" or any(step in source for step in HELD)
    return prefix + path, (prefix + path).rpartition(".")[0] if is_held else ""


def _arguments(node: Node) -> str:
    text = str(node.args)[1:-1].removesuffix(",")
    named = [f"{name}={value!r}" for name, value in node.kwargs.items()]
    text = ", ".join([text, *named] if text else named)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _target(target: Any) -> str:
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removesuffix(".default")
    return str(name).removeprefix("aten.")


class _Values:
    """Texts of recorded values. A symbolic size prints slowly, and the same few occur all over."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[Any, str]] = {}  # holds the size: its id stays its own

    def text(self, value: Any) -> str:
        """Return dtype and shape of a tensor or of several, "" for anything else."""
        if isinstance(value, torch.Tensor):
            sizes = ", ".join([self._size(size) for size in value.shape])
            return f"{dtype_abbrs.get(value.dtype, value.dtype)}[{sizes}]"
        if isinstance(value, tuple | list):
            return ", ".join(filter(None, map(self.text, value)))
        return ""

    def _size(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        key = id(size.node)
        if key not in self._sizes:
            self._sizes[key] = size, str(size)
        return self._sizes[key][1]
