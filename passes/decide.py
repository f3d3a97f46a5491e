"""Decide each projection: sparse with which settings, or dense for which reason.

What is planned comes first (``choose``: a plan or the rule), then what stands in its way, then
what keeps it dense at run time. Every refusal is a sentence for the report. A site that reads a
selection already stays as it is, so that a rewritten graph may be rewritten again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.decision import Decision, blocked, dense, sparse
from amber_compile.passes.classify_phase import RESHAPES, Phase, reshapes_of
from amber_compile.passes.correct_outputs import why_not_corrected
from amber_compile.passes.find_projections import is_own
from amber_compile.passes.sharded_operands import why_not_sharded
from amber_compile.passes.weight_operand import operation
from amber_compile.projection import Projection, fake
from amber_compile.settings import Settings
from amber_compile.shards import is_sharded

Choose = Callable[[Projection], Settings | str]
"""The plan or rule: how a projection is sparsified, or why it stays dense."""

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def decide(
    projection: Projection,
    phase: Phase,
    choose: Choose,
    *,
    tokens: int | None = None,
    min_tokens: int = 1,
    needs_grad: bool = False,
) -> Decision:
    """Return the decision for one projection of a graph in ``phase``.

    Args:
        projection: the site, under its qualified name.
        phase: of its graph.
        choose: the plan or rule.
        tokens: how many the graph has, if that is fixed; a symbolic count is compared at run time.
        min_tokens: fewer tokens stay dense.
        needs_grad: somebody may ask for gradients, which the operators do not have.
    """
    choice = choose(projection)
    if isinstance(choice, str):
        return dense(choice)
    if is_own(projection.node):
        return dense("it is rewritten already")
    if is_selected(projection.x):
        return dense("its input is already a selection")
    if phase == "decode":
        return dense("decode: one token a sequence")
    obstacle = why_not(projection, choice)
    if obstacle:
        return blocked(obstacle)
    if needs_grad:
        return blocked("the graph needs gradients: call the model under torch.no_grad()")
    if tokens is not None and tokens < min_tokens:
        return dense(f"{tokens} tokens are fewer than min_tokens={min_tokens}")
    return sparse(choice)


def why_not(projection: Projection, settings: Settings) -> str | None:
    """Return what prevents a planned projection from being sparsified, or None."""
    if projection.unsupported:
        return projection.unsupported
    weight, x = fake(projection.weight), fake(projection.x)
    if weight.device.type == "meta":
        return "its weight is a meta tensor and holds no values"
    if weight.device.type not in DEVICES:
        return f"no kernel for device {weight.device.type!r}; valid: {', '.join(DEVICES)}"
    if is_subclass(weight) and not is_sharded(weight):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in DTYPES or x.dtype not in DTYPES:
        return f"dtype {x.dtype} x {weight.dtype}; valid: {', '.join(map(str, DTYPES))}"
    if projection.channels % settings.pattern.m:
        return f"K = {projection.channels} is not a multiple of M = {settings.pattern.m}"
    if (*projection.node.args, *projection.node.kwargs.values()).count(projection.x) > 1:
        return "its input is also what the product is added to"
    if settings.part == "gate" and projection.gate_rows is None:
        return "part='gate' is planned, but the graph does not show a gate and an up half"
    if reason := why_not_sharded(projection, settings):
        return reason
    if reason := why_not_corrected(projection, settings):
        return reason
    if settings.dense_prefix and not _shows_sequence(projection):
        return "dense_prefix needs the sequence dimension, which its input does not show"
    return None


def is_selected(x: Node) -> bool:
    """Whether ``x`` is a selection, seen through reshapes and changes of layout."""
    while x.all_input_nodes and operation(x) in {*RESHAPES, "view_as", "laid_out_like", "to_local"}:
        x = x.all_input_nodes[0]
    amber = torch.ops.amber
    return x.target in (amber.nm_select.default, amber.nm_select_sharded.default)


def _shows_sequence(projection: Projection) -> bool:
    """Whether the input is ``[B, S, K]``, or was before it was flattened."""
    return fake(reshapes_of(projection.x)[0]).dim() == 3 and len(projection.shape) == 2


def is_subclass(weight: torch.Tensor) -> bool:
    """Whether a weight consists of other tensors: quantised, or a DTensor."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight)
