"""The mean of a quantity per token and its standard error over windows, in constant memory.

    mean     Σ d_w / Σ n_w                              d_w: summed over the n_w tokens of a window
    error    √( W/(W-1) · Σ (d_w - n_w · mean)² ) / Σ n_w

The tokens of a window depend on each other, so windows are the samples, and not tokens. For windows
of equal length this is the mean of their means, and its standard deviation over √W. Where a
quantity is the *difference* of two models on the same windows, the error is the paired one.
"""

from __future__ import annotations

import math

from torch import Tensor


class Mean:
    """A running mean; add windows to it."""

    def __init__(self) -> None:
        self.windows = 0
        self.tokens = self._sum = self._squares = self._products = self._counts = 0.0

    def add(self, sums: Tensor, tokens: Tensor) -> None:
        """Add windows: the sum of the quantity over each, and how many tokens it has; both [W]."""
        d, n = sums.double(), tokens.double()
        self.windows += len(n)
        self.tokens += float(n.sum())
        self._sum += float(d.sum())
        self._squares += float(d.square().sum())
        self._products += float((d * n).sum())
        self._counts += float(n.square().sum())

    @property
    def mean(self) -> float:
        """The mean per token; NaN if there is none."""
        return self._sum / self.tokens if self.tokens else math.nan

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None of fewer than two windows."""
        if self.windows < 2 or not self.tokens:
            return None
        if not math.isfinite(self._sum):
            return math.nan
        mean = self.mean
        spread = self._squares - 2 * mean * self._products + mean**2 * self._counts
        return math.sqrt(max(spread, 0.0) * self.windows / (self.windows - 1)) / self.tokens
