"""Follow the weight operand of a matmul back to the parameter it comes from.

w, w.t(), w.transpose(-1, -2), w[expert], w.to(dtype)      ->  the parameter w
w[:n], w * mask, torch.cat([w1, w2])                       ->  w, and what was computed
x, softmax(q @ k)                                          ->  None: an activation
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from amber_compile.naming import PARAMETER
from amber_compile.projection import fake, value_of

aten = torch.ops.aten
TRANSPOSES = {"t", "T", "mT", "transpose", "permute", "swapaxes", "adjoint"}
QUANTISED = (torch.int8, torch.uint8)
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "_to_copy", "detach"}
CASTS |= {"to_local"}  # of a DTensor: this process's part of it


@dataclass(frozen=True, slots=True)
class WeightOperand:
    """A matmul operand made from nothing but a parameter.

    Attributes:
        parameter: the graph input or attribute that holds it.
        transposed: whether the last two dimensions are swapped on the way.
        derived: what else was computed on the way, or None.
        picked: whether it is some of the matrices of a stack, in whatever order.
    """

    parameter: Node
    transposed: bool = False
    derived: str | None = None
    picked: bool = False


def weight_operands(
    graph: Graph, passed: Mapping[Node, WeightOperand] | None = None
) -> dict[Node, WeightOperand]:
    """Return every node of ``graph`` that is made from parameters alone, and from which one.

    ``passed`` says it of the inputs of a child graph, which do not tell by themselves.
    """
    known = dict(passed or {})
    for node in graph.nodes:
        operand = _operand(node, known)
        if operand is not None and node not in known:
            known[node] = operand
    return known


def _operand(node: Node, known: Mapping[Node, WeightOperand]) -> WeightOperand | None:
    """Return the parameter behind ``node``, or None if an activation has a part in it."""
    if node.op in ("placeholder", "get_attr"):
        return WeightOperand(node) if is_parameter(node) else None
    sources = node.all_input_nodes
    if not sources or sources[0] not in known:
        return None
    step, first = operation(node), known[sources[0]]
    if step in CASTS and len(sources) == 1:
        return first
    if step in TRANSPOSES and len(sources) == 1 and _swaps_last_two(node):
        return replace(first, transposed=not first.transposed)
    if _picks_expert(node, step):
        return replace(first, picked=True)
    if any(source not in known for source in sources):
        return None
    return replace(first, derived=first.derived or step)


def is_parameter(node: Node) -> bool:
    """Whether a graph input is a weight: a parameter, or a buffer of two dimensions.

    Quantised weights count, to be listed with their reason; buffers of positions do not.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return False
    if isinstance(value, torch.nn.Parameter) or PARAMETER in node.meta:
        return True
    if not value.is_floating_point() and value.dtype not in QUANTISED:
        return False
    if node.op == "get_attr":
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
        return bool(node.args[1] == 0)
    return len(node.args) > 1 and not isinstance(node.args[1], slice | tuple)


def _swaps_last_two(node: Node) -> bool:
    """Whether a transpose or permute exchanges the last two dimensions and moves no other."""
    before = fake(node.all_input_nodes[0])
    after = fake(node)
    if before.dim() < 2 or before.dim() != after.dim():
        return False
    swapped = (*before.stride()[:-2], before.stride(-1), before.stride(-2))
    return tuple(after.stride()) == swapped


def operation(node: Node) -> str:
    """Return what ``node`` does, by its shortest name: ``linear``, ``transpose``, ``getitem``."""
    target = node.target
    if target is getattr and len(node.args) > 1:
        return str(node.args[1])
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).split(".")[-1]
    return "getitem" if target is operator.getitem else str(getattr(target, "__name__", target))
