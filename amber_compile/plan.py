"""A plan says what to sparsify: one entry per projection of one model, in a readable file.

    {"format": "amber-plan",
     "version": 1,
     "made": {...},
     "sites": {
      "model.layers.0.self_attn.q_proj": {"shape": [4096, 4096], "sparse": {"pattern": "2:4", ...}},
      "model.layers.0.self_attn.k_proj": {"shape": [1024, 4096], "dense": "the reason"}
     },
     "checksum": "sha256:..."}

A site is a line, so two plans compare well with ``diff``. A plan refuses a model whose projections
have other names or shapes. The checksum covers everything else in the file: if that was cut short,
or edited in anything but white space, loading it says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import OptionError, PlanError
from .settings import Settings

FORMAT = "amber-plan"
VERSION = 1
BY_PLAN = "plan: "
"""Stands before the reason of a projection that stays dense because a plan says so."""
SHOWN = 5
"""How many differing names an error lists before it counts the rest."""


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """What a plan holds for one projection of weight ``shape`` ``[out, in]`` (experts first)."""

    shape: tuple[int, ...]
    choice: Settings | str


@dataclass(frozen=True)
class Plan:
    """Qualified projection name -> how it is sparsified, or why it stays dense.

    Attributes:
        sites: every linear projection of the model, in the model's order.
        made: who made the plan, how and when: free-form strings.
    """

    sites: Mapping[str, PlannedSite]
    made: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", dict(self.sites))
        object.__setattr__(self, "made", dict(self.made))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """Hash of the names and shapes that a model must have for this plan."""
        return _digest({name: list(site.shape) for name, site in self.sites.items()})

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse projections ``{name: weight shape}`` of a model the plan was not made for.

        Raises:
            PlanError: naming the projections that are unknown to the plan or of another shape.
        """
        wrong = [
            f"{name} {list(shape)} (plan: {_planned_shape(self.sites.get(name))})"
            for name, shape in shapes.items()
            if name not in self.sites or self.sites[name].shape != tuple(shape)
        ]
        if wrong:
            rest = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise PlanError(
                f"the plan belongs to another model: {len(wrong)} of {len(shapes)} projections "
                f"differ: {', '.join(wrong[:SHOWN])}{rest}. A model compiled in parts has "
                "shortened names: call amber_compile.register_model(model) first"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, checksum included."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "made": dict(self.made),
            "sites": {name: _site_to_json(site) for name, site in self.sites.items()},
        }
        return {**body, "checksum": _digest(body)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``; what was there survives a failed write."""
        path = Path(path).resolve()  # a link stays one
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(draft, "x", encoding="utf-8") as file:
                file.write(_layout(self.to_json()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: if the file is missing, cut short, edited, or of another version.
        """
        where = f"plan file {os.fspath(path)!r}"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as cause:
            raise PlanError(f"{where} cannot be read: {cause.strerror}") from cause
        except ValueError as cause:
            raise PlanError(f"{where} is cut short or not JSON: {cause}") from cause
        return cls.from_json(data, where)

    @classmethod
    def from_json(cls, data: Any, where: str = "the plan") -> Plan:
        """Read what :meth:`to_json` wrote; ``where`` names it in errors.

        Raises:
            PlanError: as :meth:`load`.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"{where} is not an Amber plan: it has no 'format': {FORMAT!r}")
        if data.get("version") != VERSION:
            raise PlanError(
                f"{where} has version {data.get('version')!r}; this Amber reads {VERSION}"
            )
        body = {key: value for key, value in data.items() if key != "checksum"}
        if data.get("checksum") != _digest(body):
            raise PlanError(
                f"{where} was edited or damaged after it was saved: wrong checksum. Change a plan "
                "in Python: Plan({**plan.sites, name: PlannedSite(...)}).save(path)"
            )
        try:
            sites = {name: _site_from_json(entry) for name, entry in data["sites"].items()}
            return cls(sites, dict(data["made"]))
        except (KeyError, TypeError, ValueError, AttributeError, OptionError) as cause:
            raise PlanError(f"{where} holds an unreadable entry: {cause!r}") from cause


def _layout(data: Mapping[str, Any]) -> str:
    """Write ``data`` as JSON with a line for each key, and one for each site."""
    sites = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(site)}" for name, site in data["sites"].items()
    )
    texts = {key: json.dumps(value) for key, value in data.items()} | {"sites": f"{{\n{sites}\n }}"}
    return (
        "{\n" + ",\n".join(f" {json.dumps(key)}: {text}" for key, text in texts.items()) + "\n}\n"
    )


def _planned_shape(site: PlannedSite | None) -> str:
    return "absent" if site is None else str(list(site.shape))


def _site_to_json(site: PlannedSite) -> dict[str, Any]:
    shape = list(site.shape)
    if isinstance(site.choice, Settings):
        return {"shape": shape, "sparse": site.choice.to_json()}
    return {"shape": shape, "dense": site.choice}


def _site_from_json(entry: Mapping[str, Any]) -> PlannedSite:
    shape = tuple(int(size) for size in entry["shape"])
    if "sparse" in entry:
        return PlannedSite(shape, Settings.from_json(entry["sparse"]))
    return PlannedSite(shape, str(entry["dense"]))


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
