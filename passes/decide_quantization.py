"""Decide for each projection whether it is quantised, or why not.

What is planned comes first (``choose``: a plan or the rule), then what stands in its way. It does
not matter whether the projection is sparse. Decode is quantised only if that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from amber_compile.decision import Decision, unquantized
from amber_compile.passes.classify_phase import Phase
from amber_compile.passes.decide import DEVICES, is_subclass
from amber_compile.passes.find_projections import is_own
from amber_compile.passes.quantize_projections import operands_of
from amber_compile.projection import Projection, fake
from amber_compile.quantization import Quantization

Choose = Callable[[Projection], Quantization | str | None]
"""The plan or rule: how a projection is quantised, why not, or None if that was not asked for."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CHANNELS = 16
"""With fewer channels the scales weigh more than the codes."""


def decide_quantization(
    projection: Projection,
    decision: Decision,
    phase: Phase,
    choose: Choose,
    *,
    decode: bool = False,
    needs_grad: bool = False,
) -> Decision:
    """Return ``decision`` with what becomes of the projection's number format.

    Args:
        projection: the site, under its qualified name.
        decision: whether it is sparse.
        phase: of its graph.
        choose: the plan or rule.
        decode: whether decode is quantised too.
        needs_grad: somebody may ask for gradients, which the operators do not have.
    """
    choice = choose(projection)
    if choice is None:
        return decision
    if is_own(projection.node):
        return replace(decision, unquantized="it is rewritten already")
    if isinstance(choice, str):
        return replace(decision, unquantized=choice)
    if phase == "decode" and not decode:
        return replace(decision, unquantized="decode: its weights stay as they are")
    obstacle = why_not_quantized(projection)
    if obstacle is None and needs_grad:
        obstacle = "the graph needs gradients: call the model under torch.no_grad()"
    if obstacle:
        return unquantized(decision, obstacle)
    return replace(decision, quantization=choice)


def why_not_quantized(projection: Projection) -> str | None:
    """Return what prevents a projection from being quantised, or None."""
    if projection.unsupported:
        return projection.unsupported
    weight, x, y = fake(projection.weight), fake(projection.x), fake(projection.node)
    if len(projection.shape) == 3:
        return "grouped experts have no 8-bit product"
    operands = operands_of(projection.node)
    if operands is None or operands.x is not projection.x:
        return f"{projection.operator} has no 8-bit product in this form"
    if weight.device.type not in DEVICES:
        return f"no kernel for device {weight.device.type!r}; valid: {', '.join(DEVICES)}"
    if is_subclass(weight):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if not all(one.dtype in DTYPES for one in (weight, x, y)):
        valid = ", ".join(map(str, DTYPES))
        return f"dtype {x.dtype} x {weight.dtype} -> {y.dtype}; valid to quantise: {valid}"
    if projection.channels < LEAST_CHANNELS:
        return f"K = {projection.channels} is too small to quantise; least: {LEAST_CHANNELS}"
    return None
