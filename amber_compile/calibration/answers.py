"""What a model answers, and how far two answers lie apart, token by token.

                    distance of a token               from a gradient g: ½ E (g · δ)²
    logits          KL(softmax a ‖ softmax b), nats   g of -log p of a label drawn from softmax a
    other outputs   ½ ‖a - b‖² / ‖a‖²                 g of Σ ± a / ‖a‖, signs drawn

δ is a small change of anything in the model, g the gradient there: both distances are quadratic
for small changes, and the drawn gradient has exactly their curvature as its second moment.

Padding (``attention_mask`` 0 in a batch) counts in neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .errors import CalibrationError

CHUNK = 1 << 24
"""Elements that are compared at a time: float copies of all logits would be gigabytes."""


class Answer:
    """The output of a model that counts: its logits, or else its first tensor of floats.

    Attributes:
        values: ``[tokens, width]`` without padding.
        logits: whether they are logits.
    """

    def __init__(self, output: Any, batch: Any) -> None:
        named = output if isinstance(output, Mapping) else vars(output) if _plain(output) else {}
        logits = named.get("logits")
        found = logits if isinstance(logits, Tensor) else _first(output)
        self.logits = isinstance(logits, Tensor)
        rows = found.reshape(-1, found.shape[-1])
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == found.shape[:-1]:
            rows = rows[mask.reshape(-1).to(rows.device) != 0]
        self.values = rows

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return a scalar whose gradient has the curvature of the distance, by chance draws."""
        if self.logits:
            return _sampled_loss(self.values, generator)
        values = self.values.float()
        size = values.detach().norm(dim=-1, keepdim=True).clamp(min=1e-30)
        signs = torch.randint(0, 2, values.shape, generator=generator) * 2.0 - 1.0
        cotangent = signs.to(values.device) / size
        return torch.sum(values * cotangent)

    def distances(self, other: Answer) -> Tensor:
        """Return the distance of ``other`` of each token, float64."""
        rows = max(1, CHUNK // self.values.shape[-1])
        parts = (torch.split(one.values, rows) for one in (self, other))
        pairs = zip(*parts, strict=True)
        measure = _divergence if self.logits else _relative
        return torch.cat([measure(a.float(), b.float()) for a, b in pairs]).double()


def _sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        draws = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64)
        ends = logits.detach().float().softmax(-1).cumsum(-1, dtype=torch.float64)
        labels = torch.searchsorted(ends, draws.to(ends.device) * ends[:, -1:]).squeeze(-1)
    return torch.nn.functional.cross_entropy(
        logits.float(), labels.clamp(max=logits.shape[-1] - 1), reduction="sum"
    )


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    terms = p.exp() * (p - q)
    return terms.where(p > -torch.inf, 0).sum(-1)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1) / a.square().sum(-1).clamp(min=1e-30) / 2


def _plain(output: Any) -> bool:
    return hasattr(output, "__dict__") and not isinstance(output, Tensor)


def _first(output: Any) -> Tensor:
    for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 2:
            return leaf
    raise CalibrationError(
        f"the model returns {type(output).__name__} without a floating-point tensor [..., width]: "
        "nothing to compare"
    )
