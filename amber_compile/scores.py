"""Scores: what makes one channel of a token better than another.

    score of channel j = |x_j| · factor_j

| score         | factor_j                                                                    |
|---------------|-----------------------------------------------------------------------------|
| `magnitude`   | none                                                                        |
| `weight_norm` | ‖W[:, j]‖₂                                                                  |
| `robust_norm` | ‖(W[:, j] − μ) / σ‖₂, where μ, σ and W know no weight outside the 0.5th to  |
|               | 99.5th percentile of the whole matrix (Amber Pruner, arXiv 2508.02128)      |

Each factor is divided by the smallest one above zero, so that no score underflows; no ranking
depends on it. That cancels σ, which is therefore never computed. A channel whose norm is zero gets
0: nothing it holds can matter. If that is every channel, all get 1.

The percentiles are exact. Sums are taken in float64, a slice of rows at a time; the factors are
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from .errors import OptionError, choices

OUTLIERS = 200  # one weight in so many is an outlier on either side: 0.5 %
SLICE = 1 << 21  # weights converted at a time: 16 MB of float64, so that they stay in a cache
HALVES = 1 << 16  # values that one half of a float32's bits can take

Factor = Callable[[torch.Tensor], torch.Tensor]


def weight_norm(weight: torch.Tensor) -> torch.Tensor:
    """Return the relative column norms, float32 [K], of ``weight`` [N, K] or experts [E, N, K].

    Raises:
        OptionError: if the weight is no such matrix, or not finite.
    """
    rows = _rows(weight)
    _, _, squares = _column_sums(rows, -torch.inf, torch.inf)
    return _relative(squares)


def robust_norm(weight: torch.Tensor, reading: str = "B") -> torch.Tensor:
    """Return the relative column norms, float32 [K], without outliers (Amber Pruner, section 3).

    The paper leaves open what an outlier adds to the norm: in ``reading`` "B" nothing, in "A" as
    much as any weight, so that it counts in neither μ nor σ but does in the norm.

    Raises:
        OptionError: if the weight is no matrix, or not finite, or the reading unknown.
    """
    if reading not in ("A", "B"):
        raise OptionError(choices("reading", reading, ("A", "B")))
    rows = _rows(weight)
    low, high = _percentiles(rows)
    count, total, squares = _column_sums(rows, low, high)
    mean = total.sum() / count.sum().clamp(min=1)
    if reading == "A":
        count, total, squares = _column_sums(rows, -torch.inf, torch.inf)
    return _relative(squares - 2 * mean * total + mean.square() * count)


SCORES: dict[str, Factor | None] = {
    "magnitude": None,
    "weight_norm": weight_norm,
    "robust_norm": robust_norm,
}


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` as one matrix [rows, K] of at most 32 bits, without gradient."""
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise OptionError(
            f"weight is {weight.dtype} {list(weight.shape)}; "
            "valid: floating point, [outputs, channels] or [experts, outputs, channels]"
        )
    rows = weight.detach().flatten(0, -2)
    return rows.float() if rows.dtype == torch.float64 else rows


def _slices(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    step = max(1, SLICE // max(1, rows.shape[1]))
    return (rows[start : start + step] for start in range(0, rows.shape[0], step))


def _column_sums(
    rows: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, per column, how many weights lie in [low, high], their sum and that of their squares.

    float64 [K] each. The square of any smaller type is finite and normal in float64.
    """
    sums = torch.zeros(3, rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in _slices(rows):
        value = part.double()
        inside = (value >= low) & (value <= high)
        value = value.where(inside, value * 0)  # NaN and inf · 0 = NaN stay, for the check
        sums += torch.stack([inside.sum(0), value.sum(0), value.square().sum(0)])
    _check_finite(sums[2])
    return sums[0], sums[1], sums[2]


def _check_finite(squares: torch.Tensor) -> None:
    broken = (~squares.isfinite()).nonzero()
    if broken.numel():
        raise OptionError(
            f"weight is not finite in {broken.numel()} of {squares.numel()} input channels, "
            f"first in channel {int(broken[0])}; valid: finite weights"
        )


def _relative(squares: torch.Tensor) -> torch.Tensor:
    """Return the square roots [K] divided by the smallest above zero, in float32."""
    norms = squares.clamp(min=0).sqrt()
    positive = norms[norms > 0]
    if not positive.numel():
        return torch.ones_like(norms, dtype=torch.float32)
    return (norms / positive.min()).clamp(max=torch.finfo(torch.float32).max).float()


# ---- percentiles ---------------------------------------------------------------------------------


def _percentiles(rows: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest weight that is no outlier.

    A percentile that falls between two weights, as interpolation has it, keeps the same ones.
    """
    if not rows.numel():
        return -torch.inf, torch.inf
    below = math.ceil((rows.numel() - 1) / OUTLIERS)
    uppers = _histogram((_order(part) >> 16) + HALVES // 2 for part in _slices(rows))
    low, high = (_weight_at(rank, uppers, rows) for rank in (below, rows.numel() - 1 - below))
    return low, high


def _weight_at(rank: int, uppers: torch.Tensor, rows: torch.Tensor) -> float:
    """Return the weight that ``rank`` others precede in order of size.

    ``uppers``, the histogram of the orders' upper halves, tells the upper half of its order. A
    histogram of the lower halves of all weights that share it tells the rest.
    """
    upper, rank = _locate(rank, uppers)
    upper -= HALVES // 2
    orders = (_order(part) for part in _slices(rows))
    lower, _ = _locate(rank, _histogram(part[part >> 16 == upper] & 0xFFFF for part in orders))
    order = torch.tensor([upper * HALVES + lower], dtype=torch.int32)
    return _flip_negative(order).view(torch.float32).item()


def _order(weights: torch.Tensor) -> torch.Tensor:
    """Return int32 that order like the weights in float32."""
    return _flip_negative(weights.float().view(torch.int32))


def _flip_negative(bits: torch.Tensor) -> torch.Tensor:
    """Turn sign and magnitude into two's complement less one, or back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _histogram(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return sum((torch.bincount(p.flatten(), minlength=HALVES) for p in parts), torch.tensor(0))


def _locate(rank: int, histogram: torch.Tensor) -> tuple[int, int]:
    """Return the bin that holds the value of this rank, and its rank inside that bin."""
    ends = histogram.cumsum(0)
    place = int(torch.searchsorted(ends, rank, right=True))
    return place, rank - int(ends[place] - histogram[place])
