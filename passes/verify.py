"""Check a graph after a pass: well formed, and every recorded value is what the node computes.

``lint`` sees a node used before it is defined; recomputing the fake values sees a wrong shape,
dtype or operand, at the node where it enters rather than in the compiler behind. Each node is
computed under the autocast regions that it lies in. Not computed: nodes without a recorded tensor,
and those that write to an operand, for a second time might differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from amber_compile.errors import VerifyError
from amber_compile.graph import call, written
from amber_compile.projection import fake_mode_of, value_of


def verify(gm: GraphModule, *, amber_only: bool = False) -> int:
    """Return how many nodes of ``gm`` were recomputed on fake tensors and agree.

    ``amber_only`` checks what reads Amber's nodes: the matmuls whose input a pass has replaced. The
    nodes themselves were recorded by running them.

    Raises:
        VerifyError: naming the first node that is malformed or computes something else.
    """
    try:
        gm.graph.lint()
    except RuntimeError as cause:
        raise VerifyError(f"the graph is malformed: {cause}") from cause
    checked = 0
    autocasts: list[Node] = []
    for node in gm.graph.nodes:
        if node.target is _enter_autocast:
            autocasts.append(node)
        elif node.target is _exit_autocast:
            autocasts.remove(node.args[0])
        elif _is_checkable(node, amber_only):
            checked += _check(node, autocasts)
    return checked


def _is_checkable(node: Node, amber_only: bool) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if amber_only and not any(_is_amber(one) for one in node.all_input_nodes):
        return False
    if written(node):
        return False
    if _is_amber(node) and not _tensors(value_of(node)):
        raise VerifyError(f"{node.format_node()} records no tensor")
    known = all(value_of(operand) is not None for operand in node.all_input_nodes)
    return known and bool(_tensors(value_of(node)))


def _check(node: Node, autocasts: Sequence[Node]) -> bool:
    expected = value_of(node)
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    try:
        with ExitStack() as modes:
            for region in autocasts:
                modes.enter_context(_autocast(*region.args))
            modes.enter_context(fake_mode_of(*_tensors(expected)))
            modes.enter_context(torch.no_grad())
            actual = call(node.target, args, kwargs)
    except Exception as cause:
        raise VerifyError(f"{node.format_node()} does not run on its inputs: {cause}") from cause
    if _describe(actual) != _describe(expected):
        raise VerifyError(
            f"{node.format_node()} computes {_describe(actual)}, records {_describe(expected)}"
        )
    return True


def _autocast(device: Any, dtype: Any, enabled: Any, cached: Any) -> torch.autocast:
    """Return the region that ``_enter_autocast`` opens; casts of fake weights are not kept."""
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_amber(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "amber"


def _describe(value: Any) -> Any:
    """Return what must agree: shape, dtype and device of tensors; symbolic sizes as they print.

    A size that depends on data has another name each time it is computed.
    """
    if isinstance(value, torch.Tensor):
        sizes = ["?" if free_unbacked_symbols(size) else str(size) for size in value.shape]
        return sizes, value.dtype, value.device
    if isinstance(value, tuple | list):
        return [_describe(item) for item in value]
    return None
