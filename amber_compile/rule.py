"""What the options say of a projection: ``skip``, then the plan, or ``projections``, or the rule.

Whether it is quantised is a question of its own: every projection is, if that was asked for, but
for the head, the routers and what ``quantize_skip`` names, or as the plan says.

The rule decides where neither a plan nor the user does. A projection's *role* comes from its name
(``presets/roles.json``), the choice from its role and layer (Amber Pruner, arXiv 2508.02128, layer
skipping): down_proj always; q_proj and gate_proj except in the layers that the paper lists for a
model (``presets/paper.json``, recognised by its shapes); everything else never.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

from .config import AmberConfig
from .plan import BY_PLAN, Plan
from .projection import Projection
from .quantization import Quantization
from .settings import Settings

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelPreset:
    """A model of the paper: how to recognise it, and where q and gate stay dense."""

    name: str
    layers: int
    shapes: Mapping[str, tuple[int, ...]]
    vocabulary: int
    dense_layers: frozenset[int]

    def matches(self, sites: Shapes, parameters: Collection[tuple[int, ...]]) -> bool:
        """Whether projections ``sites`` and all parameter shapes are those of this model."""
        found: dict[str, set[tuple[int, ...]]] = {}
        layers = set()
        for name, shape in sites.items():
            found.setdefault(role_of(name), set()).add(shape)
            layers.add(layer_of(name))
        return (
            len(layers - {None}) == self.layers
            and all(found.get(role) == {shape} for role, shape in self.shapes.items())
            and any(len(shape) == 2 and shape[0] == self.vocabulary for shape in parameters)
        )


@dataclass(frozen=True)
class Rule:
    """What the options say where no plan does."""

    config: AmberConfig
    preset: ModelPreset | None = None

    def choose(self, projection: Projection) -> Settings | str:
        """Return how ``projection`` is sparsified, or why it stays dense."""
        name, listed = projection.name, self.config.projections
        skipped = first_match(name, self.config.skip)
        if skipped is not None:
            return f"skip={skipped!r}"
        if listed is not None:
            if first_match(name, listed) is None:
                return f"not among projections={list(listed)}"
            return self._settings(name)
        reason = self._why_dense(projection)
        if reason is None and role_of(name) in _roles()["fused gate"]:
            return replace(self._settings(name), part="gate")
        return reason or self._settings(name)

    def quantization(self, projection: Projection) -> Quantization | str | None:
        """Return how ``projection`` is quantised, or why not; None if that was not asked for."""
        chosen = self.config.quantization
        if chosen is None:
            return None
        role = role_of(projection.name)
        if role in _roles()["16 bit"]:
            return f"rule: {_roles()['16 bit'][role]}"
        return _skipped(projection.name, self.config.quantize_skip) or chosen

    def _settings(self, name: str) -> Settings:
        settings = self.config.settings
        if "experts" in name.split(".") and settings.score == "robust_norm":
            return replace(settings, score="weight_norm")  # tokens are routed: no Robust-Norm
        return settings

    def _why_dense(self, projection: Projection) -> str | None:
        data, role, layer = _roles(), role_of(projection.name), layer_of(projection.name)
        if role in data["fused gate"]:
            role = "gate" if projection.gate_rows else role
        if role in data["dense"]:
            return f"rule: {data['dense'][role]}"
        if role not in data["sparse"]:
            return "rule: the name says no role; list it in projections= to sparsify it"
        layered = role in data["skippable"]
        if layered and self.preset and layer in self.preset.dense_layers:
            return f"rule: the paper keeps q and gate of layer {layer} of {self.preset.name} dense"
        return None


@dataclass(frozen=True)
class Planned:
    """What a plan says, but for what ``skip`` names."""

    plan: Plan
    skip: Iterable[str]
    quantize_skip: Iterable[str] = ()

    def choose(self, projection: Projection) -> Settings | str:
        """Return how ``projection`` is sparsified, or why it stays dense."""
        skipped = first_match(projection.name, self.skip)
        if skipped is not None:
            return f"skip={skipped!r}"
        choice = self.plan.sites[projection.name].choice
        return f"{BY_PLAN}{choice}" if isinstance(choice, str) else choice

    def quantization(self, projection: Projection) -> Quantization | str | None:
        """Return how the plan quantises ``projection``, or why not; None if it says nothing."""
        chosen = self.plan.sites[projection.name].quantization
        if chosen is None:
            return None
        if isinstance(chosen, str):
            return f"{BY_PLAN}{chosen}"
        return _skipped(projection.name, self.quantize_skip) or chosen


def _skipped(name: str, patterns: Iterable[str]) -> str | None:
    pattern = first_match(name, patterns)
    return None if pattern is None else f"quantize_skip={pattern!r}"


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first of some fnmatch patterns that ``name`` matches.

    ``*.q_proj`` matches ``q_proj`` too: the name in an attention layer compiled on its own.
    """
    matches = (one for one in patterns if fnmatchcase(name, one) or fnmatchcase(f".{name}", one))
    return next(matches, None)


def find_preset(sites: Shapes, parameters: Collection[tuple[int, ...]]) -> ModelPreset | None:
    """Return the model of the paper that has these shapes, if it is one."""
    return next((preset for preset in _presets() if preset.matches(sites, parameters)), None)


@functools.lru_cache(maxsize=4096)
def role_of(name: str) -> str:
    """Return the role of a projection by its qualified name, or ``"unknown"``."""
    for pattern, role in _roles()["names"]:
        if fnmatchcase(f".{name}", pattern):
            return str(role)
    return "unknown"


def layer_of(name: str) -> int | None:
    """Return the first number between the dots of a qualified name: the layer."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


@functools.cache
def _roles() -> dict[str, Any]:
    data: dict[str, Any] = _read("roles.json")
    return data


@functools.cache
def _presets() -> tuple[ModelPreset, ...]:
    return tuple(
        ModelPreset(
            name=entry["name"],
            layers=entry["layers"],
            shapes={role: tuple(shape) for role, shape in entry["shapes"].items()},
            vocabulary=entry["vocabulary"],
            dense_layers=frozenset(entry["dense_layers"]),
        )
        for entry in _read("paper.json")["models"]
    )


def _read(name: str) -> dict[str, Any]:
    text = resources.files("amber_compile").joinpath("presets", name).read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
