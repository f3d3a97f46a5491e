"""Spell what the passes insert in ATen, for a graph after AOTAutograd or of ``torch.export``.

    y * alpha, y + beta           ->   aten.mul(y, alpha), aten.add(y, beta)
    y.to(dtype)                   ->   prims.convert_element_type(y, dtype)
    w[a:b], w[..., a:b]           ->   aten.slice(w, dim, a, b)
    s.view_as(h)                  ->   aten.reshape(s, sizes of h)

The passes write as Dynamo does, which such graphs do not understand. Their values are recorded
under the key of such graphs. Left alone: every other node.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from amber_compile.graph import insert_call
from amber_compile.projection import fake, value_of

aten, prims = torch.ops.aten, torch.ops.prims
SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


def is_aten(gm: GraphModule) -> bool:
    """Whether ``gm`` computes tensors by operators only: it comes from AOTAutograd or an export.

    Items of a tuple are taken, and sizes computed (``torch.sym_max``), by Python's own functions.
    """
    calls = [node for node in gm.graph.nodes if node.op.startswith("call_")]
    operators = [node for node in calls if isinstance(node.target, torch._ops.OpOverload)]
    return bool(operators) and all(map(_is_in_aten, calls))


def _is_in_aten(node: Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return True
    source = node.args[0] if node.args else None
    held = value_of(source) if isinstance(source, Node) else None
    is_item = node.target is operator.getitem and isinstance(held, tuple | list)
    return is_item or isinstance(value_of(node), SIZES)


def spell_in_aten(gm: GraphModule) -> int:
    """Spell inserted nodes in ATen; return how many."""
    spelt = 0
    for node in list(gm.graph.nodes):
        if "example_value" not in node.meta:
            continue  # no pass has made it
        spelling = SPELLINGS.get(node.target) if node.op.startswith("call_") else None
        if spelling is not None and isinstance(value_of(node.args[0]), torch.Tensor):
            new = spelling(gm.graph, node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            spelt += 1
    for node in gm.graph.nodes:  # those that a spelling has inserted among them
        if "example_value" in node.meta:
            node.meta["val"] = node.meta.pop("example_value")
    gm.recompile()
    return spelt


def _elementwise(target: Any) -> Callable[[Graph, Node], Node]:
    return lambda graph, node: insert_call(graph, node, target, *node.args)


def _cast(graph: Graph, node: Node) -> Node:
    return insert_call(graph, node, prims.convert_element_type.default, *node.args)


def _slice(graph: Graph, node: Node) -> Node:
    source, index = node.args
    assert isinstance(source, Node)
    rows = index[-1] if isinstance(index, tuple) else index
    assert isinstance(rows, slice), "the passes cut rows only"
    dimension = -1 if isinstance(index, tuple) else 0
    bounds = (rows.start or 0, sys.maxsize if rows.stop is None else rows.stop)
    return insert_call(graph, node, aten.slice.Tensor, source, dimension, *bounds)


def _reshape(graph: Graph, node: Node) -> Node:
    source, like = node.args
    assert isinstance(like, Node)
    sizes = [_size(graph, node, like, at) for at in range(fake(like).dim())]
    return insert_call(graph, node, aten.reshape.default, source, sizes)


def _size(graph: Graph, node: Node, like: Node, at: int) -> int | Node:
    size = fake(like).shape[at]
    return size if isinstance(size, int) else insert_call(graph, node, aten.sym_size.int, like, at)


SPELLINGS: dict[Any, Callable[[Graph, Node], Node]] = {
    operator.mul: _elementwise(aten.mul.Tensor),
    operator.add: _elementwise(aten.add.Tensor),
    operator.getitem: _slice,
    "to": _cast,
    "view_as": _reshape,
}
