"""Follow the weight operand of a matmul back to the parameter it comes from.

w, w.t(), w.transpose(-1, -2), w[expert], w.to(dtype)      ->  the parameter w
w[:n], w * mask, torch.cat([w1, w2])                       ->  w, and what was computed
x, softmax(q @ k)                                          ->  None: an activation
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from amber_compile.projection import fake

aten = torch.ops.aten
TRANSPOSES = {"t", "T", "mT", "transpose", "permute", "swapaxes", "adjoint"}
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "_to_copy", "detach"}


@dataclass(frozen=True, slots=True)
class WeightOperand:
    """A matmul operand made from nothing but a parameter.

    Attributes:
        parameter: the graph input or attribute that holds it.
        transposed: whether the last two dimensions are swapped on the way.
        derived: what else was computed on the way, or None.
    """

    parameter: Node
    transposed: bool = False
    derived: str | None = None


def trace_weight(node: Node) -> WeightOperand | None:
    """Return the parameter behind ``node``, or None if an activation has a part in it."""
    if node.op in ("placeholder", "get_attr"):
        return WeightOperand(node) if is_parameter(node) else None
    sources = [trace_weight(argument) for argument in node.all_input_nodes]
    if not sources or sources[0] is None:
        return None
    step = _name(node)
    if step in CASTS and len(sources) == 1:
        return sources[0]
    if step in TRANSPOSES and len(sources) == 1 and _swaps_last_two(node):
        return replace(sources[0], transposed=not sources[0].transposed)
    if _picks_expert(node, step):
        return sources[0]
    if any(source is None for source in sources):
        return None
    return replace(sources[0], derived=sources[0].derived or step)


def is_parameter(node: Node) -> bool:
    """Whether a graph input is a weight: a parameter, or a floating buffer of two dimensions."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        return False
    if isinstance(value, torch.nn.Parameter) or node.op == "get_attr":
        return True
    source = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return "_parameters[" in source or ("_buffers[" in source and value.dim() >= 2)


def _picks_expert(node: Node, step: str) -> bool:
    """Whether ``node`` takes whole ``[N, K]`` matrices out of ``[E, N, K]`` experts."""
    if step not in ("getitem", "select", "index", "__getitem__"):
        return False
    stack = node.args[0]
    if not isinstance(stack, Node) or fake(stack).dim() != 3:
        return False
    if step == "select":
        return node.args[1] == 0
    return len(node.args) > 1 and not isinstance(node.args[1], slice | tuple)


def _swaps_last_two(node: Node) -> bool:
    """Whether a transpose or permute exchanges the last two dimensions and moves no other."""
    before = fake(node.all_input_nodes[0])
    after = fake(node)
    if before.dim() < 2 or before.dim() != after.dim():
        return False
    swapped = (*before.stride()[:-2], before.stride(-1), before.stride(-2))
    return tuple(after.stride()) == swapped


def _name(node: Node) -> str:
    target = node.target
    if target is getattr and len(node.args) > 1:
        return str(node.args[1])
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).split(".")[-1]
    return "getitem" if target is operator.getitem else str(getattr(target, "__name__", target))
