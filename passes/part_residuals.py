"""Part a product from the residual that Inductor has joined to it, and join the two again.

    t = permute(w)          of o_proj                  t = permute(w)      of o_proj
    y = addmm(r, x, t)      of the norm behind    ->   p = mm(x, t)        of o_proj
                                                       y = add(r, p)       of the norm behind

In ``post_grad_custom_post_pass`` the addition of a residual is part of the product in front of it,
under the name of the module that adds. A projection is named by the module of its product, and a
sparse kernel adds a bias only, so this comes before the other passes; what they leave as a product
is joined behind them, with the bits that it had. Left alone: a bias, one number an output.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from amber_compile.graph import insert_call
from amber_compile.passes.weight_operand import TRANSPOSES, operation
from amber_compile.projection import fake

aten = torch.ops.aten
STACK = "nn_module_stack"


def part_residuals(graph: Graph) -> list[tuple[Node, Node]]:
    """Part the products of ``graph``; return each with the addition behind it."""
    return [_part(graph, node) for node in list(graph.nodes) if _adds_residual(node)]


def join_residuals(graph: Graph, parted: list[tuple[Node, Node]]) -> int:
    """Join the products that are still there and that nothing but the addition reads."""
    there, joined = set(graph.nodes), 0
    for product, addition in parted:
        if product in there and list(product.users) == [addition]:
            one = _call(graph, addition, aten.addmm.default, addition.args[0], *product.args)
            addition.replace_all_uses_with(one)
            graph.erase_node(addition)
            graph.erase_node(product)
            joined += 1
    return joined


def _part(graph: Graph, node: Node) -> tuple[Node, Node]:
    residual, x, transpose = node.args
    assert isinstance(transpose, Node)
    product = _call(graph, node, aten.mm.default, x, transpose)
    if STACK in transpose.meta:
        product.meta[STACK] = transpose.meta[STACK]
    addition = _call(graph, node, aten.add.Tensor, residual, product)
    node.replace_all_uses_with(addition)
    graph.erase_node(node)
    return product, addition


def _adds_residual(node: Node) -> bool:
    """Whether a node adds as many rows as it multiplies to the product by a transposed weight."""
    if node.target is not aten.addmm.default or len(node.args) != 3 or node.kwargs:
        return False
    residual, _, weight = node.args
    if not isinstance(residual, Node) or not isinstance(weight, Node):
        return False
    is_whole = fake(residual).dim() == 2 and fake(residual).dtype == fake(node).dtype
    return is_whole and operation(weight) in TRANSPOSES


def _call(graph: Graph, site: Node, target: torch._ops.OpOverload, *args: object) -> Node:
    """Insert a call before ``site``, with its value where graphs behind AOTAutograd have it."""
    node = insert_call(graph, site, target, *args)
    node.meta["val"] = node.meta.pop("example_value")
    return node
