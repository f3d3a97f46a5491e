"""Fuse a selection with the quantisation that reads it: one kernel, one read of the activations.

    s = nm_select(x, factor, n, m, …);  codes, scale = quantize_rows(s, smooth, dtype)
                             ->   codes, scale = nm_quantize(x, factor, smooth, n, m, dtype, …)

A correction becomes part of ``scale`` and is not rounded to the activations' type any more. Left
alone: a selection that is quantised in another shape. One with other readers stays for them.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.graph import erase_unread, insert_call


def fuse_selections(gm: GraphModule) -> int:
    """Fuse each selection of ``gm`` that is quantised; return how many."""
    amber = torch.ops.amber
    fused = 0
    for node in gm.graph.find_nodes(op="call_function", target=amber.quantize_rows.default):
        selected = node.args[0]
        if isinstance(selected, Node) and selected.target is amber.nm_select.default:
            _fuse(gm, node, selected)
            fused += 1
    gm.recompile()
    return fused


def _fuse(gm: GraphModule, node: Node, selected: Node) -> None:
    x, factor, n, m, *rest = selected.args  # correction, dense_prefix, min_tokens, offsets
    _, smooth, dtype = node.args
    both = insert_call(
        *(gm.graph, node, torch.ops.amber.nm_quantize.default),
        *(x, factor, smooth, n, m, dtype, *rest),
    )
    node.replace_all_uses_with(both)
    erase_unread(gm.graph, node)
