"""An order of channels in which every group has something to drop.

    squares   (x_j f_j)² of some tokens [S, K]: what the score compares
    lost(g)   mean over tokens of the sum of the M - N smallest squares in group g
    minimise  Σ_g lost(g)   over all ways to deal K channels into groups of M

1. Channels in order of their mean square are dealt out like cards, there and back: the strongest
   of each group meets the weakest.
2. One place of every group at a time is emptied, and its channels are handed out again: the best
   such exchange of all groups at once is an assignment problem (Hungarian method, scipy). If t is
   the N-th largest square of those that stay in group g, channel j costs E min(t, x_j² f_j²) there,
   but for what g loses anyway.

Step 2 never loses more than before. It stops when a round over all places gains less than
``WORTHWHILE``. Beyond ``LARGEST`` groups a random part of them is refined at a time, so the cost
matrices stay small. Within a group channels keep their order, and groups go by their first
channel. The idea of permuting channels for N:M is that of Pool and Yu (NeurIPS 2021), for weights.

What may be permuted, and together with what, is passes/find_permutations.py's to say.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amber_compile.permute import join_orders

from .errors import CalibrationError
from .observe import Call, observing
from .reading import Batches, Reader
from .selection import Sparse, factor_of
from .statistics import Statistics

ROWS = 1024
"""Tokens that are looked at."""
ROUNDS = 4
WORTHWHILE = 0.002
"""Share of the loss that a round must gain for another one to be tried."""
LARGEST = 512
CHUNK = 1 << 20
"""Elements of the temporary tensors, so that they stay in a cache."""


def token_samples(
    reader: Reader,
    weights: Mapping[str, Tensor],
    case: Mapping[str, Sparse],
    batches: Batches,
    rows: int = ROWS,
    stage: str = "samples",
) -> dict[str, Tensor]:
    """Return squared scores [about ``rows``, K], fp32, of tokens spread evenly over the text.

    The channels are in the model's order: ``case`` must not be permuted yet. Every rank returns the
    same.
    """
    own = {name: weights[name] for name in case}
    each = -(-rows // len(batches))

    @torch.no_grad()
    def visit(number: int, batch: Any, into: Statistics) -> None:
        def look(call: Call) -> Tensor:
            places = torch.linspace(0, len(call.rows) - 1, min(each, len(call.rows))).long()
            scores = call.rows[places.to(call.x.device)].float()
            factor = factor_of(call.weight, case[call.name])
            if factor is not None:
                scores = scores * factor.to(scores.device)
            into.add(call.name, f"sample.{number:08}", scores.square())
            return call()

        with observing(own, look):
            reader(batch)

    found = reader.read(stage, batches, visit, "samples of tokens")
    return {name: _sorted_by_batch(found.of(name)) for name in case if name in found}


def _sorted_by_batch(sums: Mapping[str, Tensor]) -> Tensor:
    names = sorted(name for name in sums if name.startswith("sample."))
    return torch.cat([sums[name] for name in names]).float()


# ---- the order -----------------------------------------------------------------------------------


def balanced_permutation(
    squares: Tensor, n: int, m: int, groups: int = 1, repeats: int = 1, seed: int = 0
) -> Tensor:
    """Return the order in which a site's channels lose least, int32 [K].

    Channel j of the new order is channel ``permutation[j]`` of the old one.

    Args:
        squares: squared scores [S, K].
        n: channels that are kept of every ``m``.
        m: size of a group.
        groups: heads, or groups of heads, that channels do not leave; each has an order of its own.
        repeats: heads of such a group, which share their order.
        seed: of the parts that are refined together where there are many groups.
    """
    size = squares.shape[1] // (groups * repeats)
    if size % m or n == m:
        return torch.arange(squares.shape[1], dtype=torch.int32)
    heads = squares.view(len(squares), groups, repeats, size).permute(1, 0, 2, 3)
    orders = [_order(own.reshape(-1, size), n, m, seed) for own in heads]
    return join_orders(torch.stack(orders), repeats)


def lost(squares: Tensor, n: int, m: int) -> float:
    """Return the share of the sum of ``squares`` [S, K] that is dropped."""
    groups = torch.arange(squares.shape[1]).view(-1, m)
    return float(_lost(squares, groups, n).sum() / squares.sum(1).mean().clamp_min(1e-300))


def _order(squares: Tensor, n: int, m: int, seed: int) -> Tensor:
    squares = squares[squares.isfinite().all(1)].cpu()
    if not len(squares):
        return torch.arange(squares.shape[1])
    groups = _dealt(squares.mean(0), m)
    before = straight = _lost(squares, torch.arange(squares.shape[1]).view(-1, m), n).sum()
    for round_ in range(ROUNDS):
        drawn = torch.Generator().manual_seed(seed + round_)
        mixed = torch.randperm(len(groups), generator=drawn)
        for at in range(0, len(groups), LARGEST):
            part = mixed[at : at + LARGEST]
            groups[part] = _refined(squares, groups[part], n)
        after = _lost(squares, groups, n).sum()
        if after > before * (1 - WORTHWHILE):
            break
        before = after
    if after >= straight:
        return torch.arange(squares.shape[1])
    inside = groups.sort(dim=1).values
    return inside[inside[:, 0].argsort()].flatten()


def _dealt(strength: Tensor, m: int) -> Tensor:
    """Return groups of channels [K/m, m], dealt out by ``strength`` there and back."""
    hands = strength.argsort(descending=True, stable=True).view(m, -1)
    hands[1::2] = hands[1::2].flip(1)
    return hands.T.contiguous()


def _refined(squares: Tensor, groups: Tensor, n: int) -> Tensor:
    """Return ``groups`` [G, m] after one exchange at each place."""
    assign = _scipy().linear_sum_assignment
    for place in range(groups.shape[1]):
        channels = groups[:, place]
        stay = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
        others = squares[:, stay.flatten()].view(len(squares), *stay.shape)
        bound = others.sort(-1, descending=True).values[..., n - 1]
        _, chosen = assign(_costs(bound, squares[:, channels]).numpy())
        groups = groups.clone()
        groups[:, place] = channels[torch.from_numpy(chosen)]
    return groups


def _costs(bound: Tensor, squares: Tensor) -> Tensor:
    """Return E min(t, x²) [G, G] of each channel in each group, from [S, G] both."""
    step = max(1, CHUNK // squares.numel())
    parts = (bound[:, at : at + step, None] for at in range(0, bound.shape[1], step))
    return torch.cat([torch.minimum(part, squares[:, None]).mean(0) for part in parts])


def _lost(squares: Tensor, groups: Tensor, n: int) -> Tensor:
    """Return what each group loses [G] on average over tokens."""
    ranked = squares[:, groups.flatten()].view(len(squares), *groups.shape).sort(-1).values
    return ranked[..., : groups.shape[1] - n].sum(-1).mean(0)


def _scipy() -> Any:
    try:
        return importlib.import_module("scipy.optimize")
    except ImportError as cause:
        raise CalibrationError(
            "permutations need scipy: pip install 'amber-compile[calibrate]'"
        ) from cause
