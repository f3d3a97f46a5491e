"""How a sparse projection selects: pattern, score, correction and dense prefix, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import OptionError, choices, whole_number
from .pattern import Pattern

SCORES = ("magnitude", "weight_norm", "robust_norm")
CORRECTIONS = ("norm", "variance")
FAST = Pattern(2, 4)
"""The pattern that sparse tensor cores execute, and so the default."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides which channels of a site survive and what becomes of them.

    Attributes:
        pattern: N of every M consecutive input channels are kept; "N:M" is read as one.
        score: ``magnitude``, ``weight_norm`` or ``robust_norm``.
        correction: ``None``, ``"norm"`` or ``"variance"``: the per-token rescale of kept values.
        dense_prefix: tokens at the start of every sequence that are left dense.
        part: ``"gate"`` to sparsify only the gate half of a fused gate and up projection.

    Raises:
        OptionError: if a value is not one of these.
    """

    pattern: Pattern = FAST
    score: str = "weight_norm"
    correction: str | None = None
    dense_prefix: int = 0
    part: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", Pattern.parse(self.pattern))
        if self.score not in SCORES:
            raise OptionError(choices("score", self.score, SCORES))
        if self.correction not in (None, *CORRECTIONS):
            raise OptionError(choices("correction", self.correction, (None, *CORRECTIONS)))
        prefix = whole_number("dense_prefix", self.dense_prefix, 0)
        object.__setattr__(self, "dense_prefix", prefix)
        if self.part not in (None, "gate"):
            raise OptionError(choices("part", self.part, (None, "gate")))

    def __str__(self) -> str:
        return f"{self.pattern}, {self.how}"

    @property
    def how(self) -> str:
        """Everything but the pattern, in words."""
        parts = [self.score]
        if self.correction:
            parts.append(f"{self.correction} correction")
        if self.dense_prefix:
            parts.append(f"dense prefix {self.dense_prefix}")
        if self.part:
            parts.append(f"{self.part} half only")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return {**values, "pattern": str(self.pattern)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Read what :meth:`to_json` wrote.

        Raises:
            OptionError: if a key is unknown or a value is invalid.
        """
        known = [setting.name for setting in fields(cls)]
        for key in data:
            if key not in known:
                raise OptionError(choices("site setting", key, known))
        return cls(**data)
