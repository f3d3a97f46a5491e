"""What a report keeps of a graph beside its sketch, to rebuild it in a script (reproducer.py).

The sketch of a graph (sketch.py) has its nodes and the text of their arguments. This adds what text
does not tell: which functions the nodes call, the layout of the inputs, where parameters lie in the
model, and what was decided. No tensor and no node is kept, so a report keeps no model alive; 2,200
nodes take 9 ms, 3 % of the time of rewriting.

A graph with constants, nested graphs or objects that a script cannot write down is not kept: the
reasons are, instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .analysis import Analysis, Decisions, Names
from .config import AmberConfig
from .naming import parameter_path
from .projection import value_of
from .stages import LONGEST

HELD = {"_parameters[": "parameter", "_buffers[": "buffer", "_modules[": "buffer"}
"""What in the source of an input tells that a module holds it."""
CONTAINERS = (tuple, list, dict, str)


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a graph.

    Attributes:
        name: of the placeholder.
        kind: ``parameter``, ``buffer``, ``input`` or, for a symbolic size, ``size``.
        path: qualified name of what a module holds, or "".
        shape: sizes, symbolic ones as they were while tracing; of a size, itself.
        stride: in elements, the same.
        dtype: of a tensor.
        device: of a tensor: its type, ``cpu`` or ``cuda``.
        symbols: name of each size that is symbolic, else "".
    """

    name: str
    kind: str
    path: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    symbols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TracedSite:
    """A projection: its qualified name, weight shape, nodes, and what was decided for it."""

    name: str
    shape: tuple[int, ...]
    node: str
    weight: str
    choice: Any  # Settings, or the reason why it stays dense


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph in which something was to be sparse, as far as its sketch does not tell.

    Attributes:
        targets: what each node calls, in order.
        inputs: of the graph.
        sites: its projections.
        long: the arguments of nodes, by name, that the sketch cuts off.
        config: the options.
        unable: why the graph cannot be rebuilt; then nothing else is kept.
    """

    targets: tuple[Callable[..., Any] | str, ...] = ()
    inputs: tuple[Input, ...] = ()
    sites: tuple[TracedSite, ...] = ()
    long: tuple[tuple[str, str], ...] = ()
    config: AmberConfig | None = None
    unable: tuple[str, ...] = ()


def traced(analysis: Analysis, owners: Mapping[Names, Decisions]) -> Traced | None:
    """Return what to keep of a graph; None if nothing in it is to be sparse."""
    sparse = [names for names, choices in owners.items() if any(one.sparse for one in choices)]
    if not sparse:
        return None
    nodes = list(analysis.gm.graph.nodes)
    unable = tuple(dict.fromkeys(filter(None, map(_why_unable, nodes))))
    if unable:
        return Traced(unable=unable)
    names = sparse[0]
    sites = tuple(
        TracedSite(name, one.shape, one.node.name, one.weight.name, own.settings or own.reason)
        for name, one, own in zip(names, analysis.projections, owners[names], strict=True)
    )
    prefix = _prefix([one.name for one in analysis.projections], names)
    inputs = [_input(node, prefix) for node in nodes if node.op == "placeholder"]
    long = [(node.name, _arguments(node)) for node in nodes if _is_long(node)]
    targets = tuple([node.target for node in nodes])
    return Traced(targets, tuple(inputs), sites, tuple(long), analysis.config)


def _why_unable(node: Node) -> str | None:
    """Return why no script can have ``node``, or None if one can."""
    if node.op in ("get_attr", "call_module"):
        return f"it holds {node.target}: a nested graph, a module or a constant"
    if node.op == "placeholder":
        value = value_of(node)
        if not isinstance(value, torch.Tensor | torch.SymInt | int):
            return f"its input {node.name} is a {type(value).__name__}"
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            return f"its input {node.name} is laid out as {value.layout}"
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"it calls {node.target}, which takes nested graphs"
    return None


def _input(node: Node, prefix: str) -> Input:
    value: Any = value_of(node)
    if not isinstance(value, torch.Tensor):
        return Input(node.name, "size", "", (_hint(value),), symbols=(str(value),))
    source = str(getattr(getattr(node, "_dynamo_source", None), "name", ""))
    kind = next((kind for step, kind in HELD.items() if step in source), "input")
    symbolic = [isinstance(size, torch.SymInt) for size in value.shape]
    return Input(
        node.name,
        kind,
        prefix + parameter_path(node) if kind != "input" else "",
        tuple([_hint(size) for size in value.shape]),
        tuple([_hint(step) for step in value.stride()]),
        str(value.dtype),
        value.device.type,
        tuple([str(n) if s else "" for n, s in zip(value.shape, symbolic, strict=True)])
        if any(symbolic)
        else (),
    )


def _hint(size: int | torch.SymInt) -> int:
    """Return a size as it was while tracing; 2 for one that is known at run time only."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return int(hint) if isinstance(hint, int) else 2
    return size


def _is_long(node: Node) -> bool:
    """Whether a sketch cuts off the arguments; they are written out only if they may be long."""
    values = (*node.args, *node.kwargs.values())
    may_be = len(values) > LONGEST // 20 or any(isinstance(one, CONTAINERS) for one in values)
    return may_be and len(_arguments(node)) > LONGEST


def _arguments(node: Node) -> str:
    text = str(node.args)[1:-1].removesuffix(",")
    return ", ".join(filter(None, [text, *(f"{k}={v!r}" for k, v in node.kwargs.items())]))


def _prefix(local: Sequence[str], names: Names) -> str:
    """Return what the names in the graph lack: ``model.layers.0.``."""
    pairs = zip(names, local, strict=True)
    return next((full.removesuffix(name) for full, name in pairs if full != name), "")
