"""See that a projection is a gate and an up projection in one.

    y = linear(x, w);   gate, up = y.chunk(2, dim=-1);      act(gate) * up      ->  the gate's rows
    y = linear(x, w);   gate, up = y[..., :I], y[..., I:];  act(gate) * up      ->  the gate's rows
    y = mm(x, w).view(B, S, 2 * I);  gate, up = ...                             ->  the gate's rows

Only the graph is believed, not a name: the first half must go through a function of itself alone,
which may be spelt in several steps, and meet the second half in a product. Interleaved halves
(``y[..., ::2]``) are not recognised.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from amber_compile.passes.weight_operand import operation
from amber_compile.projection import fake, value_of

aten = torch.ops.aten
PRODUCTS = {operator.mul, torch.mul, "mul", aten.mul.Tensor}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
VIEWS = {"chunk", "split", "split_with_sizes", "tensor_split", "narrow", "slice", "getitem"}


def gate_rows(node: Node) -> int | None:
    """Return the number of output rows of ``node`` that are the gate, or None if it is no such."""
    halves = halves_of(node)
    if halves is None:
        return None
    gate, up = halves
    products = [user for user in up.users if user.target in PRODUCTS]
    if any(_is_function(_other(product, up), gate, product) for product in products):
        return fake(gate).shape[-1]
    return None


def halves_of(node: Node) -> tuple[Node, Node] | None:
    """Return the two views of the halves of ``node``'s last dimension, if nothing else reads it."""
    whole = reshaped(node)
    starts = {_start(part, whole): part for part in _parts(whole)}
    middle = fake(whole).shape[-1] // 2
    if set(starts) != {0, middle} or len(list(_parts(whole))) != 2:
        return None
    return starts[0], starts[middle]


def reshaped(node: Node) -> Node:
    """Return what gives the rows of a flattened product their shape again, or the product itself.

    Behind AOTAutograd that is one operator, with the sizes in a list.
    """
    user = _only_user(node)
    is_reshape = user is not None and user.target in RESHAPES
    if user is None or not is_reshape or fake(user).shape[-1] != fake(node).shape[-1]:
        return node
    return user


def _other(product: Node, factor: Node) -> Node | None:
    """Return the other factor of ``product``, if it is another activation."""
    others = [one for one in product.all_input_nodes if one is not factor]
    return others[0] if len(others) == 1 else None


def _is_function(value: Node | None, source: Node, reader: Node) -> bool:
    """Whether ``value`` is computed from ``source`` alone, and only ``reader`` reads of it."""
    if value is None:
        return False
    between: set[Node] = set()
    ahead = [value]
    while ahead:
        node = ahead.pop()
        if node is source or node in between:
            continue
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            return False
        between.add(node)
        ahead += node.all_input_nodes
    readers = {user for node in (source, *between) if node is not value for user in node.users}
    return bool(between) and readers == between and list(value.users) == [reader]


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
