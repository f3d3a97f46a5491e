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
from .quantization import FORMATS, Quantization
from .settings import CORRECTIONS, FAST, SCORES, Settings

PRESETS = {
    "amber": Settings(FAST, "weight_norm", "norm"),
    "paper": Settings(FAST, "robust_norm", None),
}
BY_PRESET = "preset"
"""The value of ``score`` and ``correction`` that means: as the preset has it."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")
DECIDED_BY_PLAN = (
    *("preset", "pattern", "score", "correction", "projections", "dense_prefix", "quantize"),
)


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
        quantize: ``"int8"`` or ``"fp8"``: weights and activations of every linear projection but
            the head are quantised in prefill, whether or not they are sparse (W8A8).
        quantize_skip: fnmatch patterns of qualified module names that are not quantised.
        decode: ``"int8"`` or ``"fp8"``, as ``quantize``: decode multiplies by the quantised weights
            too, and their 16-bit copies are released. Decode is as it was if not given.
        fold_smooth: multiply smooth vectors into the norm or the projection before, where the graph
            allows, instead of in the quantise kernel.
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
    quantize: str | None = None
    quantize_skip: Iterable[str] = ()
    decode: str | None = None
    fold_smooth: bool = False
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
        self._check_choice("quantize", (None, *FORMATS))
        self._check_choice("decode", (None, *FORMATS))
        for name in ("strict", "check", "fold_smooth"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name}={getattr(self, name)!r} must be True or False")
        self._set("min_tokens", whole_number("min_tokens", self.min_tokens, 1))
        if self.dense_prefix is not None:
            self._set("dense_prefix", whole_number("dense_prefix", self.dense_prefix, 0))
        if self.pattern is not None:
            self._set("pattern", Pattern.parse(self.pattern))
        if self.projections is not None:
            self._set("projections", _name_patterns("projections", self.projections))
        for name in ("skip", "quantize_skip"):
            self._set(name, _name_patterns(name, getattr(self, name)))
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor={self.inductor!r} must be a dict of config patches")
        self._set("inductor", dict(self.inductor))
        self._check_plan()
        self._check_decode()

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

    def _check_decode(self) -> None:
        if self.decode is None:
            return
        if self.check:
            raise OptionError("check=True needs the weights that decode= releases; drop one")
        planned = _formats(self.plan) if isinstance(self.plan, Plan) else {self.quantize}
        if planned != {self.decode}:
            what = ", ".join(sorted(map(str, planned))) or "nothing"
            raise OptionError(
                f"decode={self.decode!r} shares the weights of prefill, which are quantised to "
                f"{what}; valid: None, or quantize={self.decode!r} beside it"
            )

    @property
    def quantization(self) -> Quantization | None:
        """How a projection is quantised where no plan says otherwise."""
        return Quantization(self.quantize) if self.quantize else None

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


def _formats(plan: Plan) -> set[str | None]:
    """Return the number formats that a plan quantises to."""
    chosen = [site.quantization for site in plan.sites.values()]
    return {one.dtype for one in chosen if isinstance(one, Quantization)}


def _name_patterns(name: str, value: object) -> tuple[str, ...]:
    """Return the fnmatch patterns in ``value``, one string or several."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise OptionError(f"{name}={value!r} must be a list of fnmatch patterns like '*.q_proj'")
    patterns = tuple(patterns)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(f"{name}={value!r} must hold fnmatch patterns like '*.q_proj' only")
    return patterns
