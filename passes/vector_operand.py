"""Follow an operand of one number a channel back to the parameter it comes from.

    w * normalised,   (1 + w.float()) * normalised,   layer_norm(x, shape, w, b)

Only casts and one added number are seen through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from amber_compile.passes.weight_operand import CASTS, is_parameter, operation
from amber_compile.projection import fake, value_of

SUMS = {"add", "__add__", "__radd__"}
NORMS = {"layer_norm", "rms_norm"}
"""Functions that end in a product with their weight."""


@dataclass(frozen=True, slots=True)
class Vector:
    """An operand with one number a channel: ``parameter + offset``, cast to the operand's type."""

    user: Node
    operand: Node
    parameter: Node
    offset: float = 0.0


def vectors_of_norm(node: Node) -> list[Vector]:
    """Return weight and bias of a function that normalises; nothing if they are no parameters."""
    names = ["input", "normalized_shape", "weight"] + ["bias"] * (operation(node) == "layer_norm")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("weight") is None:
        return []
    operands = [given[name] for name in ("weight", "bias") if given.get(name) is not None]
    found = [as_vector(node, operand) for operand in operands]
    return [] if None in found else [one for one in found if one]


def vector_operand(node: Node) -> Vector | None:
    """Return the one of two operands that is such a vector."""
    found = [as_vector(node, operand) for operand in node.all_input_nodes]
    vectors = [one for one in found if one is not None]
    return vectors[0] if len(vectors) == 1 and len(found) == 2 else None


def as_vector(user: Node, operand: object) -> Vector | None:
    """Return ``operand`` as a parameter plus a number, cast to some type, if that is what it is."""
    held = value_of(operand) if isinstance(operand, Node) else None
    if not isinstance(operand, Node) or not isinstance(held, torch.Tensor):
        return None
    if held.shape != fake(user).shape[-1:]:
        return None
    node, offset = operand, 0.0
    while node.op not in ("placeholder", "get_attr"):
        added = _constant_of(node)
        if operation(node) in CASTS and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        elif added is not None and not offset:
            node, offset = node.all_input_nodes[0], added
        else:
            return None
    return Vector(user, operand, node, offset) if is_parameter(node) else None


def _constant_of(node: Node) -> float | None:
    """Return the number that ``node`` adds to its one input, if it does nothing else."""
    if operation(node) not in SUMS or len(node.args) != 2 or node.kwargs:
        return None
    numbers = [one for one in node.args if isinstance(one, int | float)]
    return float(numbers[0]) if len(numbers) == 1 else None
