"""How a sparse projection selects: pattern, score, correction and dense prefix, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionError, choices
from .pattern import Pattern

SCORES = ("magnitude", "weight_norm", "robust_norm")
CORRECTIONS = ("norm", "variance")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides which channels of a site survive and what becomes of them.

    Attributes:
        pattern: N of every M consecutive input channels are kept.
        score: ``magnitude``, ``weight_norm`` or ``robust_norm``.
        correction: ``None``, ``"norm"`` or ``"variance"``: the per-token rescale of kept values.
        dense_prefix: tokens at the start of every sequence that are left dense.
        part: ``"gate"`` to sparsify only the gate half of a fused gate and up projection.

    Raises:
        OptionError: if a value is not one of these.
    """

    pattern: Pattern = Pattern(2, 4)
    score: str = "weight_norm"
    correction: str | None = None
    dense_prefix: int = 0
    part: str | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise OptionError(choices("score", self.score, SCORES))
        if self.correction is not None and self.correction not in CORRECTIONS:
            raise OptionError(choices("correction", self.correction, ("None", *CORRECTIONS)))
        if type(self.dense_prefix) is not int or self.dense_prefix < 0:
            raise OptionError(f"dense_prefix={self.dense_prefix!r} must be a whole number >= 0")
        if self.part not in (None, "gate"):
            raise OptionError(choices("part", self.part, ("None", "gate")))

    def __str__(self) -> str:
        parts = [str(self.pattern), self.score]
        if self.correction:
            parts.append(f"{self.correction} correction")
        if self.dense_prefix:
            parts.append(f"first {self.dense_prefix} tokens dense")
        if self.part:
            parts.append(f"{self.part} half only")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {
            "pattern": str(self.pattern),
            "score": self.score,
            "correction": self.correction,
            "dense_prefix": self.dense_prefix,
            "part": self.part,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Read what :meth:`to_json` wrote.

        Raises:
            OptionError: if a key is unknown or a value is invalid.
        """
        known = {"pattern", "score", "correction", "dense_prefix", "part"}
        for key in data:
            if key not in known:
                raise OptionError(choices("site setting", key, known))
        return cls(**{**data, "pattern": Pattern.parse(data.get("pattern", "2:4"))})
