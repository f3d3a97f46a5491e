"""Follow channels through a graph: the axes of every tensor, and where their order matters.

    h = silu(linear(x, gate)) * linear(x, up)     one axis: rows of gate, rows of up, channels of h

An operation that no rule knows (channel_rules.py), and whatever writes in place, blocks all axes it
reads and makes blocked ones; so do the inputs and outputs of the graph, buffers among them.
Parameters start free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from amber_compile.graph import written
from amber_compile.passes.channel_axes import Axis, block, fresh, size_of
from amber_compile.passes.channel_call import Call, Flow
from amber_compile.passes.channel_rules import RULES
from amber_compile.passes.weight_operand import operation
from amber_compile.projection import value_of

SHAPES = {"size", "shape", "dim", "ndim", "numel", "dtype", "device", "stride", "is_floating_point"}
"""What is read off a tensor without its values."""


def follow_channels(gm: GraphModule) -> Flow:
    """Return the axes of every tensor of a graph of static sizes."""
    flow: Flow = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            _block_all(node, flow, "they leave the graph")
        elif node.op in ("placeholder", "get_attr"):
            value = value_of(node)
            own = isinstance(value, torch.nn.Parameter)
            flow[node] = _made(value, None if own else "they are an input of the graph")
        else:
            flow[node] = _outcome(node, flow)
    return flow


def _outcome(node: Node, flow: Flow) -> Any:
    """Return the axes of what ``node`` computes, and block what it needs in order."""
    step = operation(node)
    if step in SHAPES:
        return None
    rule = RULES.get(step)
    if rule is not None and not written(node):
        try:
            found = rule(Call(node, flow))
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            found = None  # arguments that no rule expects
        if found is not None and _fits(found, value_of(node)):
            return found
    _block_all(node, flow, f"{step} may mix or tell apart what it reads")
    return _made(value_of(node), f"{step} makes them")


def _block_all(node: Node, flow: Flow, reason: str) -> None:
    for source in node.all_input_nodes:
        block([one for one in tree_leaves(flow.get(source)) if isinstance(one, Axis)], reason)


def _fits(found: Any, value: Any) -> bool:
    """Whether axes are those of a recorded value, as far as sizes tell."""
    if isinstance(found, list):
        several = isinstance(value, tuple | list) and len(found) == len(value)
        return several and all(map(_fits, found, value))
    return isinstance(value, torch.Tensor) and [*map(size_of, found)] == [*value.shape]


def _made(value: Any, blocked: str | None) -> Any:
    """Return axes of their own for a tensor, or a list of them for several."""
    if isinstance(value, torch.Tensor):
        return tuple(fresh(int(size), blocked) for size in value.shape)
    if isinstance(value, tuple | list):
        return [_made(one, blocked) for one in value]
    return None
