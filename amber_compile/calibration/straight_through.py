"""Select on the way forward; on the way back what was selected is a constant.

    forward    y = select(x)
    backward   ∂/∂x_j = g_j · y_j / x_j          the correction's scale (or 1) where kept, else 0

A selection is a step function of x. Between the steps this is its gradient, but for the scale of a
correction, which counts as a constant as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``select(x)``, of the shape of ``x`` and differentiable by it."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return select(x)
    function: Any = _StraightThrough  # apply is untyped
    result: Tensor = function.apply(x, select)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        kept = select(x)
        ctx.save_for_backward(torch.where(kept != 0, kept / x, 0))
        return kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None
