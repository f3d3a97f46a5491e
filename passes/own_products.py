"""Know again what Amber has put into a graph, so that rewriting twice changes nothing more.

y = nm_linear(x, w, ...),  y = quantized_linear(codes, ...)     a product of its own
gate = linear(nm_select(x), w[:I]);   up = linear(x, w[I:])     both halves of one that was split
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from amber_compile.passes.weight_operand import TRANSPOSES, operation
from amber_compile.projection import Projection

PRODUCTS = {"nm_linear", "nm_quantized_linear", "quantized_linear"}
CUTS = {"getitem", "slice"}


def is_own(node: Node) -> bool:
    """Whether ``node`` is a product that Amber has put into the graph, or left beside one."""
    return is_product(node) or _is_other_half(node)


def is_product(node: Node) -> bool:
    """Whether ``node`` is one of Amber's operators that multiply by a weight."""
    return _is_amber(node, PRODUCTS)


def _is_amber(node: Node, names: Collection[str]) -> bool:
    target = node.target
    is_amber = isinstance(target, torch._ops.OpOverload) and target.namespace == "amber"
    return is_amber and operation(node) in names


def _is_other_half(node: Node) -> bool:
    """Whether ``node`` multiplies by a part of a weight, and a selection by another part of it."""
    own = [one for one in map(_cut, node.all_input_nodes) if one is not None]
    return any(
        _is_amber(operand, {"nm_select"})
        for part in own
        for other in part.all_input_nodes[0].users
        if other is not part and operation(other) in CUTS
        for product in _readers(other)
        for operand in product.all_input_nodes
    )


def _cut(operand: Node) -> Node | None:
    """Return the node that cuts ``operand`` out of a tensor, seen through transposes."""
    while operation(operand) in TRANSPOSES and len(operand.all_input_nodes) == 1:
        operand = operand.all_input_nodes[0]
    return operand if operation(operand) in CUTS and operand.all_input_nodes else None


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        yield from _readers(user) if operation(user) in TRANSPOSES else [user]


def joined(projections: Sequence[Projection]) -> list[Projection]:
    """Return ``projections``, with the whole shape for those that Amber has split into products."""
    rows: dict[str, dict[Node, int]] = {}
    for one in projections:
        if is_product(one.node):
            rows.setdefault(one.name, {})[one.weight] = one.shape[0]
    return [
        replace(one, shape=(sum(rows[one.name].values()), one.channels))
        if is_product(one.node)
        else one
        for one in projections
    ]
