"""How a projection is quantised: number format and smoothing, independent of how it is sparse.

    Y ≈ (q(X') q(W')ᵀ) · a · w        a [tokens], w [outputs]: symmetric scales, max|row| / limit

The weight is quantised once, a scale per output channel; activations on each call, a scale per
token, taken from the values that the selection keeps (Outstanding-sparse, arXiv 2508.02128,
section 4). X' and W' are X and W after smoothing (smoothing.py), which leaves X' W'ᵀ what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import OptionError, choices

FORMATS = ("int8", "fp8")
ALPHAS = {"smoothquant": 0.5, "outstanding": 0.1}
"""The kinds of smoothing, each with the exponent of its paper."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How one projection is quantised.

    Attributes:
        dtype: ``"int8"`` or ``"fp8"`` (e4m3), of weights and activations alike.
        smooth: ``None``, ``"smoothquant"`` or ``"outstanding"``: what the plan's smooth vector of
            this projection was made by.
        alpha: its exponent, 0 to 1; that of the paper if not given.

    Raises:
        OptionError: if a value is not one of these.
    """

    dtype: str = "int8"
    smooth: str | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in FORMATS:
            raise OptionError(choices("quantize", self.dtype, FORMATS))
        if self.smooth is None:
            if self.alpha is not None:
                raise OptionError(f"alpha={self.alpha!r} belongs to a smoothing; smooth is None")
            return
        if self.smooth not in ALPHAS:
            raise OptionError(choices("smooth", self.smooth, (None, *ALPHAS)))
        alpha = ALPHAS[self.smooth] if self.alpha is None else self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise OptionError(f"alpha={alpha!r} must be a number from 0 to 1")
        object.__setattr__(self, "alpha", float(alpha))

    def __str__(self) -> str:
        return f"{self.dtype}, {self.smooth} {self.alpha:g}" if self.smooth else self.dtype

    def to_json(self) -> dict[str, Any]:
        """Return the quantisation as plain JSON values."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quantization:
        """Read what :meth:`to_json` wrote.

        Raises:
            OptionError: if a key is unknown or a value is invalid.
        """
        known = [one.name for one in fields(cls)]
        for key in data:
            if key not in known:
                raise OptionError(choices("quantisation setting", key, known))
        return cls(**data)
