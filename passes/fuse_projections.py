"""Fuse a selection with the projection that reads it, for a sparse matrix unit to take both.

    s = nm_select(x, factor, 2, 4, …);  y = linear(s, w, b)
                                        ->   y = nm_linear(x, w, b, factor, 2, 4, …)

Two projections that share a selection become two such nodes: each compresses what it reads. Left
as they are, with the reason in the report: projections on a CPU, spelled otherwise than ``linear``,
of a pattern, type or size that no sparse instruction takes, or on a device without one. They
multiply the masked activation, which costs what a dense product does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from amber_compile.graph import insert_call
from amber_compile.kernels.nm_linear import why_masked
from amber_compile.passes.find_projections import LINEARS
from amber_compile.projection import Projection, fake
from amber_compile.settings import Settings

WhySeparate = Callable[[Projection, Settings], str | None]


def why_separate(projection: Projection, settings: Settings) -> str | None:
    """Return why a projection's selection and product stay two nodes, or None if they fuse."""
    node = projection.node
    if node.target not in LINEARS:
        return f"{projection.operator} has no sparse kernel"
    x, y = fake(projection.x), fake(node)
    weight = fake(_operands(node)["weight"])
    if y.dtype != x.dtype or weight.dtype != x.dtype:
        return f"{x.dtype} x {weight.dtype} -> {y.dtype}: one type is needed"
    if settings.part == "gate":
        weight = weight[: projection.gate_rows]
    if settings.dense_prefix and x.dim() < 3:
        return "dense_prefix of a flattened input"
    return why_masked(x, weight, settings.pattern.n, settings.pattern.m, settings.correction)


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
    x, *rest = selected.args
    operands = _operands(node)
    product = insert_call(
        *(gm.graph, node, torch.ops.amber.nm_linear.default),
        *(x, operands["weight"], operands.get("bias")),
        *rest[:6],  # factor, n, m, correction, dense_prefix, min_tokens
    )
    node.replace_all_uses_with(product)
    gm.graph.erase_node(node)
    if not selected.users:
        gm.graph.erase_node(selected)


def _operands(node: Node) -> dict[str, Any]:
    return dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
