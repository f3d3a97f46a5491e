"""What two models say of the same tokens, summed over each window.

    nll      -log p(token)                       of the next token, where there is one to tell
    kl       Σ_v p_v (log p_v - log q_v)         p dense, q sparse, in nats
    top1     argmax p = argmax q
    bad      log p has NaN: the logits hold NaN or +inf, or nothing but -inf

Logits are made log-probabilities in float32, a part of a window at a time. Nothing is left out of
a sum: a bad token makes its window NaN, a token that is ruled out makes its loss infinite. A bad
token agrees with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 23
"""Logits that are made log-probabilities at a time: 32 MB in float32."""


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of each window of a batch, float64 [B]; no targets, no losses."""

    tokens: Tensor
    dense_nll: Tensor
    sparse_nll: Tensor
    kl: Tensor
    top1: Tensor
    dense_bad: Tensor
    sparse_bad: Tensor


def compare(dense: Tensor, sparse: Tensor, targets: Tensor | None, live: Tensor) -> Sums:
    """Compare the logits of two models.

    Args:
        dense: [B, S, V].
        sparse: [B, S, V].
        targets: the token that each position should tell, [B, S]; None if there is none.
        live: positions that count, [B, S].
    """
    totals = torch.zeros(len(dense), 7, dtype=torch.float64)
    rows = max(1, CHUNK // dense.shape[-1])
    for window, total in enumerate(totals):
        for start in range(0, dense.shape[1], rows):
            part = window, slice(start, start + rows)
            kept = live[part]
            aims = None if targets is None else targets[part][kept]
            total += _sums(dense[part][kept], sparse[part][kept], aims)
    return Sums(*totals.unbind(1))


def _sums(dense: Tensor, sparse: Tensor, targets: Tensor | None) -> Tensor:
    """Return the seven sums over tokens, from logits [T, V] and targets [T]."""
    p, q = dense.float().log_softmax(-1), sparse.float().log_softmax(-1)
    bad = p.isnan().any(-1), q.isnan().any(-1)
    mass = p.exp()
    kl = (mass * (p - q)).where(mass != 0, 0).sum(-1)  # a token that p rules out; NaN is not 0
    top1 = (p.argmax(-1) == q.argmax(-1)) & ~bad[0] & ~bad[1]
    losses = [torch.zeros_like(kl)] * 2
    if targets is not None:
        losses = [-each.gather(-1, targets[:, None])[:, 0] for each in (p, q)]
    columns = (torch.ones_like(kl), *losses, kl, top1, *bad)
    return torch.stack([column.double().sum() for column in columns]).cpu()
