"""Check a graph after a pass: well formed, and every recorded value is what the node computes.

``lint`` sees a node used before it is defined; recomputing the fake values sees a wrong shape,
dtype or operand, at the node where it enters rather than in the compiler behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from amber_compile.errors import VerifyError
from amber_compile.projection import fake_mode_of, value_of


def verify(gm: GraphModule, *, amber_only: bool = False) -> int:
    """Return how many nodes of ``gm`` were recomputed on fake tensors and agree.

    ``amber_only`` checks Amber's own nodes and what reads them: what a pass can have broken.

    Raises:
        VerifyError: naming the first node that is malformed or computes something else.
    """
    try:
        gm.graph.lint()
    except RuntimeError as cause:
        raise VerifyError(f"the graph is malformed: {cause}") from cause
    checked = 0
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and _is_checkable(node, amber_only):
            checked += _check(node)
    return checked


def _is_checkable(node: Node, amber_only: bool) -> bool:
    if value_of(node) is None or any(value_of(arg) is None for arg in node.all_input_nodes):
        return False
    return not amber_only or any(_is_amber(near) for near in (node, *node.all_input_nodes))


def _check(node: Node) -> bool:
    expected = value_of(node)
    mode = fake_mode_of(*tree_leaves(expected))
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    try:
        with mode, torch.no_grad():
            actual = _call(node, args, kwargs)
    except Exception as cause:
        raise VerifyError(f"{node.format_node()} does not run on its inputs: {cause}") from cause
    if _describe(actual) != _describe(expected):
        raise VerifyError(
            f"{node.format_node()} computes {_describe(actual)}, records {_describe(expected)}"
        )
    return True


def _call(node: Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _is_amber(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "amber"


def _describe(value: Any) -> Any:
    """Return what must agree: shape, dtype and device of tensors; symbolic sizes as they print."""
    if isinstance(value, torch.Tensor):
        return [str(size) for size in value.shape], value.dtype, value.device
    if isinstance(value, tuple | list):
        return [_describe(item) for item in value]
    return None
