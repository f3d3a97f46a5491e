"""What a calibration is asked for, checked before anything runs.

| corrections | what may be turned on                                  | extra memory     |
|-------------|--------------------------------------------------------|------------------|
| `none`      | nothing                                                | none             |
| `free`      | `factor` and `output`: one copy of the weights         | vectors          |
| `all`       | the same and `weight`: prefill has a weight of its own | each such weight |

Names allow what they say: `norm`; `permutation`, with which `permute_channels(model, plan)` comes
before compiling; `free,permutation` for both. What is allowed is used only where held-out text is
better with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from amber_compile.errors import OptionError, choices, whole_number
from amber_compile.pattern import Pattern
from amber_compile.quantization import FORMATS, Quantization

CORRECTIONS = {
    "norm": "kept values are rescaled so that a token keeps its norm",
    "factor": "channels are scored by weight norm and loss gradient",
    "output": "outputs are multiplied by a number each, and shifted",
    "weight": "prefill multiplies by a weight W* fitted to the selection",
    "permutation": "channels are dealt into groups anew: permute_channels(model, plan) first",
}
FREE = ("factor", "output")
NAMED = {"none": (), "free": FREE, "all": (*FREE, "weight")}
RULES = (None, "paper")
GIGABYTE = 1 << 30


@dataclass(frozen=True)
class CalibrationOptions:
    """The keyword arguments of :func:`amber_compile.calibrate`, as values.

    Attributes:
        pattern: N:M of every sparse site.
        max_error: the damage that the whole model may take on held-out text: a mean over tokens, KL
            in nats for logits.
        coverage: share of the linear multiply-accumulates to make sparse, 0 to 1.
        rule: ``"paper"`` for the paper's projections.
        corrections: ``"free"``, ``"all"``, ``"none"``, or names of ``CORRECTIONS``.
        quantize: ``"int8"`` or ``"fp8"``, of every projection but heads and routers.
        smooth: ``"smoothquant"``, ``"outstanding"`` or ``None``, where that is quantised.
        alpha: exponent of the smoothing; that of its paper if not given.
        projections: fnmatch patterns of names that may be sparse.
        skip: fnmatch patterns of names that stay dense.
        validation: share of the batches that is held out.
        steps: of tuning (tuning.py); 0 for none.
        memory: bytes that statistics [K, K] may take; with less, the text is read more often.
        seed: of what is drawn.

    Raises:
        OptionError: for a value that is malformed, out of range, or contradicts another.
    """

    pattern: Pattern | str = "2:4"
    max_error: float | None = None
    coverage: float | None = None
    rule: str | None = None
    corrections: str | Iterable[str] = "free"
    quantize: str | None = None
    smooth: str | None = "smoothquant"
    alpha: float | None = None
    projections: Iterable[str] = ("*",)
    skip: Iterable[str] = ()
    validation: float = 0.25
    steps: int = 40
    memory: int = 4 * GIGABYTE
    seed: int = 0

    def __post_init__(self) -> None:
        self._set("pattern", Pattern.parse(self.pattern))
        if self.rule not in RULES:
            raise OptionError(choices("rule", self.rule, RULES))
        goals = ("max_error", "coverage", "rule")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{given[0]}= and {given[1]}= both say how much: drop one")
        _check_number("max_error", self.max_error, 0.0, float("inf"))
        _check_number("coverage", self.coverage, 0.0, 1.0)
        _check_number("validation", self.validation, 0.05, 0.9)
        self._set("corrections", _corrections(self.corrections))
        for name in ("projections", "skip"):
            self._set(name, _names(name, getattr(self, name)))
        self._set("seed", whole_number("seed", self.seed, 0))
        self._set("steps", whole_number("steps", self.steps, 0))
        self._set("memory", whole_number("memory", self.memory, 1))
        if self.quantize not in (None, *FORMATS):
            raise OptionError(choices("quantize", self.quantize, (None, *FORMATS)))
        if self.quantize:
            self._set("alpha", self.quantization.alpha)

    @classmethod
    def from_keywords(cls, given: Mapping[str, Any]) -> CalibrationOptions:
        """Return the options of these names.

        Raises:
            OptionError: for an unknown one, naming the closest.
        """
        known = [option.name for option in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(choices("option", name, known))
        return cls(**given)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def quantization(self) -> Quantization:
        """How a projection is quantised, if any is."""
        return Quantization(self.quantize or FORMATS[0], self.smooth, self.alpha)

    def allows(self, correction: str) -> bool:
        """Whether a correction may be turned on."""
        return correction in self.corrections

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return values | {"pattern": str(self.pattern)}


def _corrections(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of corrections: a set's, or those given, with commas between in a string."""
    names = value.split(",") if isinstance(value, str) else [*value]
    for name in names:
        if name not in {**NAMED, **CORRECTIONS}:
            raise OptionError(choices("corrections", name, (*NAMED, *CORRECTIONS)))
    return tuple(dict.fromkeys(one for name in names for one in NAMED.get(name, (name,))))


def _names(name: str, value: object) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise OptionError(f"{name}={value!r} must be fnmatch patterns like '*.q_proj'")
    return tuple(patterns)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= float(str(value)) <= high:
        raise OptionError(f"{name}={value!r} must be a number from {low:g} to {high:g}")
