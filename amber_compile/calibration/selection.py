"""Sparsify one product of an eager model as the backend does.

    y' = (select(x; pattern, factor, correction) Wᵀ + b) · α + β          W, or the plan's W*

The operator that selects is the compiled model's own (kernels/nm_select.py), and α, β are applied
in fp32 with one rounding, so an eager run under :func:`sparse_product` gives what the compiled
model gives. With a permutation, channel j of the plan is channel ``permutation[j]`` of the model:
the model may lie in its own order still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.scores import SCORES
from amber_compile.settings import CALIBRATED, Settings

from .observe import Call
from .straight_through import straight_through

Tensors = Mapping[str, Tensor]
"""Of one site, under the names that a plan has for them."""


@dataclass(frozen=True, eq=False)  # equal is only what is the same: tensors are not compared
class Sparse:
    """How one site is sparse: its settings, and the tensors that they speak of."""

    settings: Settings
    tensors: Tensors = field(default_factory=dict)


def sparse_product(call: Call, sparse: Sparse) -> Tensor:
    """Return the outputs of ``call`` as ``sparse`` makes them."""
    settings, tensors = sparse.settings, sparse.tensors
    kept = selection(call, sparse)
    if settings.part == "gate":
        return _half(call, call(kept))
    weight = _in_model_order(tensors["weight"], sparse) if settings.updated_weight else None
    y = call(kept, None if weight is None else weight.to(call.weight))
    if not (settings.output_scale or settings.output_bias):
        return y
    result = y.float()
    if settings.output_scale:
        result = result * tensors["output_scale"].to(y.device)
    if settings.output_bias:
        result = result + tensors["output_bias"].to(y.device)
    return result.to(y.dtype)


def selection(call: Call, sparse: Sparse) -> Tensor:
    """Return what ``call`` reads, without the channels that are dropped."""
    settings, order = sparse.settings, _order(sparse)
    factor = factor_of(call.weight, sparse)
    x = call.x if order is None else call.x[..., order.to(call.x.device)]

    def select(x: Tensor) -> Tensor:
        kept: Tensor = torch.ops.amber.nm_select(
            x,
            None if factor is None else factor.to(x.device),
            settings.pattern.n,
            settings.pattern.m,
            settings.correction,
            settings.dense_prefix,
            0,
            call.offsets if factor is not None else None,
        )
        return kept

    kept = straight_through(x, select)
    return kept if order is None else _in_model_order(kept, sparse)


def factor_of(weight: Tensor, sparse: Sparse) -> Tensor | None:
    """Return the score's factor, fp32 [K] or [E, K], in the order that the plan has."""
    if sparse.settings.score == CALIBRATED or "factor" in sparse.tensors:
        return sparse.tensors["factor"]
    function: Any = SCORES[sparse.settings.score]
    if function is None:
        return None
    rows = weight.shape[-2] // 2 if sparse.settings.part == "gate" else weight.shape[-2]
    matrix = weight[..., :rows, :]
    factor: Tensor = (
        torch.stack([*map(function, matrix)]) if weight.dim() == 3 else function(matrix)
    )
    order = _order(sparse)
    return factor if order is None else factor[..., order]


def with_factor(weight: Tensor, sparse: Sparse) -> Sparse:
    """Return ``sparse`` with its score's factor at hand, so that no product computes it again."""
    factor = factor_of(weight, sparse)
    return (
        sparse if factor is None else replace(sparse, tensors={**sparse.tensors, "factor": factor})
    )


def _half(call: Call, sparse: Tensor) -> Tensor:
    """Return outputs whose first half, the gate, is ``sparse`` and whose second is dense."""
    rows = sparse.shape[-1] // 2
    return torch.cat([sparse[..., :rows], call()[..., rows:]], dim=-1)


def _order(sparse: Sparse) -> Tensor | None:
    return sparse.tensors["permutation"].long() if sparse.settings.permuted else None


def _in_model_order(values: Tensor, sparse: Sparse) -> Tensor:
    """Return ``values`` [..., K] of the plan's order in that of the model."""
    order = _order(sparse)
    return values if order is None else values[..., order.argsort().to(values.device)]
