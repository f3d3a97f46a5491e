"""How a sparse projection selects: pattern, score, correction and dense prefix, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import OptionError, choices, whole_number
from .pattern import Pattern

SCORES = ("magnitude", "weight_norm", "robust_norm")
CALIBRATED = "calibrated"
"""The score whose factor is a tensor of the plan."""
CORRECTIONS = ("norm", "variance")
FLAGS = ("output_scale", "output_bias", "updated_weight", "permuted")
FAST = Pattern(2, 4)
"""The pattern that sparse tensor cores execute, and so the default."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides which channels of a site survive and what becomes of them.

    Attributes:
        pattern: N of every M consecutive input channels are kept; "N:M" is read as one.
        score: ``magnitude``, ``weight_norm`` or ``robust_norm``; ``calibrated`` in a plan.
        correction: ``None``, ``"norm"`` or ``"variance"``: the per-token rescale of kept values.
        dense_prefix: tokens at the start of every sequence that are left dense.
        part: ``"gate"`` to sparsify only the gate half of a fused gate and up projection.
        output_scale: outputs are multiplied by the plan's α, one number a channel.
        output_bias: the plan's β, one number a channel, is added to the outputs.
        updated_weight: the plan's weight is multiplied by, not the model's own.
        permuted: the plan is for channels that ``permute_channels`` has put into another order.

    Raises:
        OptionError: if a value is not one of these.
    """

    pattern: Pattern = FAST
    score: str = "weight_norm"
    correction: str | None = None
    dense_prefix: int = 0
    part: str | None = None
    output_scale: bool = False
    output_bias: bool = False
    updated_weight: bool = False
    permuted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", Pattern.parse(self.pattern))
        if self.score not in (*SCORES, CALIBRATED):
            raise OptionError(choices("score", self.score, (*SCORES, CALIBRATED)))
        if self.correction not in (None, *CORRECTIONS):
            raise OptionError(choices("correction", self.correction, (None, *CORRECTIONS)))
        prefix = whole_number("dense_prefix", self.dense_prefix, 0)
        object.__setattr__(self, "dense_prefix", prefix)
        if self.part not in (None, "gate"):
            raise OptionError(choices("part", self.part, (None, "gate")))
        for name in FLAGS:
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name}={getattr(self, name)!r} must be True or False")

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
        parts += [name.replace("_", " ") for name in FLAGS if getattr(self, name)]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values; of the flags, those that are set."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        shown = {name: value for name, value in values.items() if name not in FLAGS or value}
        return {**shown, "pattern": str(self.pattern)}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the plan's tensors that a site with these settings needs."""
        needed = {
            "factor": self.score == CALIBRATED,
            "output_scale": self.output_scale,
            "output_bias": self.output_bias,
            "weight": self.updated_weight,
            "permutation": self.permuted,
        }
        return tuple(name for name, wanted in needed.items() if wanted)

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
