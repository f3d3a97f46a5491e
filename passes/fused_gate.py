"""See that a projection is a gate and an up projection in one.

    y = linear(x, w);   gate, up = y.chunk(2, dim=-1);   act(gate) * up       ->  the gate's rows

Only the graph is believed, not a name: the first half must go through one unary function and meet
the second half in a product. Interleaved halves (``y[..., ::2]``) are not recognised.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from amber_compile.projection import fake

PRODUCTS = {operator.mul, torch.mul, "mul", torch.ops.aten.mul.Tensor}


def gate_rows(node: Node) -> int | None:
    """Return the number of output rows of ``node`` that are the gate, or None if it is no such."""
    halves = halves_of(node)
    if halves is None:
        return None
    gate, up = halves
    activation = _only_user(gate)
    if activation is None or activation.all_input_nodes != [gate]:
        return None
    product = _only_user(activation)
    if product is None or product.target not in PRODUCTS:
        return None
    return fake(gate).shape[-1] if set(product.all_input_nodes) == {activation, up} else None


def halves_of(node: Node) -> tuple[Node, Node] | None:
    """Return the two nodes that take the halves of the last dimension of ``node``, if any do."""
    chunk = _only_user(node)
    if chunk is None or chunk.target not in ("chunk", torch.chunk) or not _is_in_two(chunk):
        return None
    taken = {user.args[1]: user for user in chunk.users if user.target is operator.getitem}
    return (taken[0], taken[1]) if set(taken) == {0, 1} and len(chunk.users) == 2 else None


def _is_in_two(chunk: Node) -> bool:
    count = chunk.args[1] if len(chunk.args) > 1 else chunk.kwargs.get("chunks")
    dim = chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)
    size = fake(chunk.all_input_nodes[0]).shape[-1]
    return count == 2 and dim in (-1, fake(chunk.all_input_nodes[0]).dim() - 1) and size % 2 == 0


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
