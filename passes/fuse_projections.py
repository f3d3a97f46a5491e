"""Fuse a selection with the projection that reads it, for a sparse matrix unit to take both.

    s = nm_select(x, factor, 2, 4, …);  y = linear(s, w, b)
                                        ->   y = nm_linear(x, w, b, factor, 2, 4, …)

    y = (linear(s, w, b) * alpha + beta).to(y.dtype)
                                        ->   y = nm_linear(x, w, b, factor, 2, 4, …, alpha, beta)

    codes, scale = quantize_rows(s, smooth, dtype)
    y = quantized_linear(codes, scale, w8, w_scale, b, y.dtype)
                                        ->   y = nm_quantized_linear(x, factor, smooth, w8, …)

Two projections that share a selection become two such nodes: each compresses what it reads. Left
as they are, with the reason in the report: projections on a CPU, spelled otherwise than ``linear``,
of a pattern, type or size that no sparse instruction takes, or on a device without one. They
multiply the masked activation, which costs what a dense product does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from amber_compile.graph import erase_unread, insert_call
from amber_compile.kernels.nm_linear import why_masked
from amber_compile.passes.correct_outputs import UPDATED, weight_of
from amber_compile.passes.find_projections import LINEARS
from amber_compile.passes.quantize_projections import operands_of
from amber_compile.passes.sharded_operands import why_not_fused
from amber_compile.passes.weight_operand import operation
from amber_compile.projection import Projection, fake, value_of
from amber_compile.settings import Settings

WhySeparate = Callable[[Projection, Settings], str | None]


def why_separate(projection: Projection, settings: Settings) -> str | None:
    """Return why a projection's selection and product stay two nodes, or None if they fuse."""
    node, how = projection.node, (settings.pattern.n, settings.pattern.m, settings.correction)
    if node.target is torch.ops.amber.quantized_linear.default:
        if settings.dense_prefix and fake(projection.x).dim() < 3:
            return "dense_prefix of a flattened input"
        return why_masked(fake(projection.x), fake(_operand(node, 2)), *how)
    operands = _operands(node)
    if operands is None:
        return f"{projection.operator} has no sparse kernel"
    if reason := why_not_fused(projection, settings):
        return reason
    x, y = fake(projection.x), fake(node)
    weight = fake(operands["weight"])
    if y.dtype != x.dtype or weight.dtype != x.dtype:
        return f"{x.dtype} x {weight.dtype} -> {y.dtype}: one type is needed"
    if settings.part == "gate":
        weight = weight[: projection.gate_rows]
    if settings.dense_prefix and x.dim() < 3:
        return "dense_prefix of a flattened input"
    return why_masked(x, weight, *how)


def fuse_projections(
    gm: GraphModule,
    sites: Sequence[tuple[Projection, Node]],
    settings: Sequence[Settings],
    why_separate: WhySeparate = why_separate,
) -> int:
    """Fuse each sparsified site that a sparse kernel serves; return how many.

    Args:
        gm: a rewritten graph.
        sites: its projections, each with the selection it reads, as ``sparsify_projections`` gives.
        settings: of each site.
        why_separate: the rule.
    """
    fused = 0
    for (projection, selected), chosen in zip(sites, settings, strict=True):
        if selected.target is not torch.ops.amber.nm_select.default:
            continue  # seen through a reshape, which the fused node would have to undo
        if why_separate(projection, chosen) is None:
            _fuse(gm, projection.node, selected)
            fused += 1
    gm.recompile()
    return fused


def _fuse(gm: GraphModule, node: Node, selected: Node) -> None:
    """Put the fused operator in the place of ``node``, and of what corrects its outputs."""
    x, factor, n, m, *rest = selected.args  # correction, dense_prefix, min_tokens, offsets
    if node.target is torch.ops.amber.quantized_linear.default:
        _, _, weight, scale, bias, out = node.args
        _, smooth, dtype = _operand(_operand(node, 0), 0).args
        product = insert_call(
            *(gm.graph, node, torch.ops.amber.nm_quantized_linear.default),
            *(x, factor, smooth, weight, scale, bias, n, m, dtype, *rest[:3], out),
        )
        end = node
    else:
        operands, (end, alpha, beta) = _operands(node) or {}, _corrected(node)
        weight, rows = operands["weight"], operands.get("rows")
        if rows is not None:
            weight = insert_call(gm.graph, end, operator.getitem, weight, rows)
        product = insert_call(
            *(gm.graph, end, torch.ops.amber.nm_linear.default),
            *(x, weight, operands.get("bias"), factor, n, m, *rest[:3]),
            *((alpha, beta) if end is not node else ()),
        )
    end.replace_all_uses_with(product)
    erase_unread(gm.graph, end)


def _corrected(node: Node) -> tuple[Node, Node | None, Node | None]:
    """Return where the outputs of ``node`` are corrected, by what scale and what bias."""
    found: dict[Any, Node | None] = {operator.mul: None, operator.add: None}
    step = node
    while len(step.users) == 1:
        (user,) = step.users
        if user.target == "to" and user.args[1:] == (fake(node).dtype,):
            return user, found[operator.mul], found[operator.add]
        vector = user.args[1] if user.target in found and user.args[0] is step else None
        if not isinstance(vector, Node) or not _is_vector(vector) or found[operator.add]:
            break
        if found[user.target] is not None:
            break
        found[user.target] = vector
        step = user
    return node, None, None


def _is_vector(node: Node) -> bool:
    """Whether ``node`` is one number an output in fp32, given to the graph or derived in it."""
    value = value_of(node)
    given = node.op == "placeholder" or operation(node) == "derive"
    known = given and isinstance(value, torch.Tensor)
    return known and value.dim() == 1 and value.dtype == torch.float32


def _operand(node: Node, at: int) -> Node:
    operand = node.args[at]
    assert isinstance(operand, Node)
    return operand


def _operands(node: Node) -> dict[str, Any] | None:
    """Return input, weight [N, K] and bias of a product, or None if it is spelt otherwise.

    With ``rows``, the product has these rows of the weight only.
    """
    if node.target in LINEARS:
        return dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    found = operands_of(node)
    if found is None or node.target not in UPDATED:
        return None
    transposed, rows = weight_of(node), None
    if operation(transposed) == "getitem":  # columns of the transpose: half of a gate and up
        index: Any = transposed.args[1]
        transposed, rows = transposed.all_input_nodes[0], index[-1]
    if operation(transposed) not in ("permute", "t") or len(transposed.all_input_nodes) != 1:
        return None
    weight = transposed.all_input_nodes[0]
    return {"input": found.x, "weight": weight, "rows": rows, "bias": found.bias}
