"""The options of ``torch.compile(model, backend="amber", options={...})``, checked once.

``AmberConfig`` is a value: frozen, hashable, comparable. Strings are parsed when it is made, so
that no later stage meets a malformed pattern or an unknown key. ``vars(config)`` are its options
again: ``torch.compile(model, backend="amber", options=vars(config))``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import OptionError, choices, whole_number
from .pattern import Pattern
from .plan import Plan
from .settings import CORRECTIONS, FAST, SCORES, Settings

PRESETS = {
    "amber": Settings(FAST, "weight_norm", "norm"),
    "paper": Settings(FAST, "robust_norm", None),
}
BY_PRESET = "preset"
"""The value of ``score`` and ``correction`` that means: as the preset has it."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DECIDED_BY_PLAN = ("preset", "pattern", "score", "correction", "projections", "dense_prefix")


@dataclass(frozen=True)
class AmberConfig:
    """The options of one compilation.

    Attributes:
        preset: ``"amber"`` (our best settings that need no calibration) or ``"paper"``
            (Amber Pruner, arXiv 2508.02128: Robust-Norm, no correction).
        pattern: N:M, 1 <= N <= M <= 32, M a power of two; ``"2:4"`` if not given.
        score: ``magnitude``, ``weight_norm``, ``robust_norm`` (experts of an MoE: ``weight_norm``
            instead, as in the paper), or ``"preset"``.
        correction: ``None``, ``"norm"``, ``"variance"``, or ``"preset"``.
        projections: fnmatch patterns of qualified module names to sparsify, instead of the rule.
        skip: fnmatch patterns of qualified module names that stay dense whatever else says.
        plan: a :class:`Plan` or the path of one; it then decides which, and with what settings.
        min_tokens: a call with fewer tokens stays dense (one token a sequence always does).
        dense_prefix: tokens at the start of every sequence that are left dense; 0 if not given.
        strict: a planned projection that cannot be rewritten is an error.
        check: run dense and sparse side by side on the first call, report the error per site.
        mode: an Inductor mode (``torch.compile`` refuses ``mode=`` beside ``options=``).
        inductor: Inductor config patches, such as ``{"max_autotune": True}``.

    Once made, ``pattern`` is a :class:`Pattern`, ``plan`` a :class:`Plan`, names are tuples.

    Raises:
        OptionError: for an unknown option or value, naming the valid ones.
        PlanError: if ``plan`` is a path that holds no readable plan.
    """

    preset: str = "amber"
    pattern: Pattern | str | None = None
    score: str = BY_PRESET
    correction: str | None = BY_PRESET
    projections: Iterable[str] | None = None
    skip: Iterable[str] = ()
    plan: Plan | str | os.PathLike[str] | None = None
    min_tokens: int = 1
    dense_prefix: int | None = None
    strict: bool = False
    check: bool = False
    mode: str = "default"
    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._check_choice("preset", PRESETS)
        self._check_choice("mode", MODES)
        self._check_choice("score", (*SCORES, BY_PRESET))
        self._check_choice("correction", (None, *CORRECTIONS, BY_PRESET))
        for name in ("strict", "check"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name}={getattr(self, name)!r} must be True or False")
        self._set("min_tokens", whole_number("min_tokens", self.min_tokens, 1))
        if self.dense_prefix is not None:
            self._set("dense_prefix", whole_number("dense_prefix", self.dense_prefix, 0))
        if self.pattern is not None:
            self._set("pattern", Pattern.parse(self.pattern))
        if self.projections is not None:
            self._set("projections", _name_patterns("projections", self.projections))
        self._set("skip", _name_patterns("skip", self.skip))
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor={self.inductor!r} must be a dict of config patches")
        self._set("inductor", dict(self.inductor))
        self._check_plan()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_choice(self, name: str, valid: Iterable[str | None]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str | None) or value not in valid:
            raise OptionError(choices(name, value, valid))

    def _check_plan(self) -> None:
        if self.plan is None:
            return
        if isinstance(self.plan, str | os.PathLike):
            self._set("plan", Plan.load(self.plan))
        if not isinstance(self.plan, Plan):
            raise OptionError(f"plan={self.plan!r} must be a Plan or the path of a plan file")
        defaults = {option.name: option.default for option in fields(self)}
        for name in DECIDED_BY_PLAN:
            if getattr(self, name) != defaults[name]:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} contradicts plan=: the plan decides it; "
                    f"drop one of the two (skip= and min_tokens= go with a plan)"
                )

    @property
    def settings(self) -> Settings:
        """What a sparse site does where no plan says otherwise."""
        preset = PRESETS[self.preset]
        return Settings(
            pattern=Pattern.parse(self.pattern or preset.pattern),
            score=preset.score if self.score == BY_PRESET else self.score,
            correction=preset.correction if self.correction == BY_PRESET else self.correction,
            dense_prefix=preset.dense_prefix if self.dense_prefix is None else self.dense_prefix,
        )

    @classmethod
    def from_options(cls, mode: str | None, options: Mapping[str, Any] | None) -> AmberConfig:
        """Read the ``mode=`` or ``options=`` that ``torch.compile`` hands to a backend.

        Raises:
            OptionError: for an unknown key, naming the closest valid one.
        """
        if not isinstance(options, Mapping | None):
            raise OptionError(
                f"options={options!r} must be a dict; of an AmberConfig: vars(config)"
            )
        given = dict(options or {})
        if mode is not None:
            given["mode"] = mode
        valid = [option.name for option in fields(cls)]
        for key in given:
            if key not in valid:
                raise OptionError(choices("option", key, valid))
        return cls(**given)


def _name_patterns(name: str, value: object) -> tuple[str, ...]:
    """Return the fnmatch patterns in ``value``, one string or several."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise OptionError(f"{name}={value!r} must be a list of fnmatch patterns like '*.q_proj'")
    patterns = tuple(patterns)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(f"{name}={value!r} must hold fnmatch patterns like '*.q_proj' only")
    return patterns
