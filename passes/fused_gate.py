"""See that a projection is a gate and an up projection in one.

    y = linear(x, w);   gate, up = y.chunk(2, dim=-1);      act(gate) * up      ->  the gate's rows
    y = linear(x, w);   gate, up = y[..., :I], y[..., I:];  act(gate) * up      ->  the gate's rows

Only the graph is believed, not a name: the first half must go through one unary function and meet
the second half in a product. Interleaved halves (``y[..., ::2]``) are not recognised.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from amber_compile.passes.weight_operand import operation
from amber_compile.projection import fake, value_of

PRODUCTS = {operator.mul, torch.mul, "mul", torch.ops.aten.mul.Tensor}
VIEWS = {"chunk", "split", "split_with_sizes", "tensor_split", "narrow", "slice", "getitem"}


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
    """Return the two views of the halves of ``node``'s last dimension, if nothing else reads it."""
    starts = {_start(part, node): part for part in _parts(node)}
    middle = fake(node).shape[-1] // 2
    if set(starts) != {0, middle} or len(list(_parts(node))) != 2:
        return None
    return starts[0], starts[middle]


def _parts(node: Node) -> Iterator[Node]:
    """Yield what is taken out of ``node``, by itself or among several at once."""
    for user in node.users:
        yield from user.users if isinstance(value_of(user), tuple | list) else [user]


def _start(part: Node, whole: Node) -> int | None:
    """Return where ``part``, a view of half of the last dimension of ``whole``, begins in it."""
    if operation(part) not in VIEWS or not isinstance(value_of(part), torch.Tensor):
        return None
    half, full = fake(part), fake(whole)
    is_half = half.dim() == full.dim() and 2 * half.shape[-1] == full.shape[-1]
    if not is_half or half.stride() != full.stride() or full.stride(-1) != 1:
        return None
    return int(half.storage_offset() - full.storage_offset())


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
