"""A plan says what to sparsify: one entry per projection of one model, in a readable file.

    {"format": "amber-plan",
     "version": 2,
     "made": {...},
     "tensors": {"file": "llama.plan.<id>.safetensors", "id": "...", "bytes": 1872384},
     "sites": {
      "model.layers.0.self_attn.q_proj": {"shape": [4096, 4096], "sparse": {"pattern": "2:4", ...}},
      "model.layers.0.self_attn.k_proj": {"shape": [1024, 4096], "dense": "the reason"}
     },
     "checksum": "sha256:..."}

A site is a line, so two plans compare well with ``diff``; ``amber plan diff`` says more. "quantize"
beside it tells how a site is quantised, or why not; "moves" which parameters a permutation of its
channels moves. What calibration measured and fitted lies in the tensors file, which is mapped, not
read. A plan refuses a model whose projections have other names or shapes. The checksum covers
everything else in the JSON: if that was cut short, or edited in anything but white space, loading
it says so. Version 1 had neither tensors nor quantisation, and is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plan_file
from .errors import OptionError, PlanError
from .plan_tensors import PlanTensors
from .quantization import Quantization
from .settings import Settings

if TYPE_CHECKING:
    from .plan_diff import PlanDiff

FORMAT = "amber-plan"
VERSION = 2
READS = (1, 2)
BY_PLAN = "plan: "
"""Stands before the reason of a projection that stays dense because a plan says so."""
SHOWN = 5
"""How many differing names an error lists before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a parameter holds the channels that a permutation of a site puts into another order.

    Channel d of group g lies at ``start + (g * repeats + r) * step + d`` of dimension ``dim``, for
    each r below ``repeats``: query heads that read the values of one key and value head.
    """

    parameter: str
    dim: int
    start: int
    step: int
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """What a plan holds for one projection.

    Attributes:
        shape: of its weight, ``(N, K)``, experts first.
        choice: how it is sparse, or why it is dense.
        quantization: how it is quantised, or why it is not, if somebody asked.
        moves: what :func:`amber_compile.permute_channels` permutes for this projection.
    """

    shape: tuple[int, ...]
    choice: Settings | str
    quantization: Quantization | str | None = None
    moves: tuple[Move, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Qualified projection name -> how it is sparsified, or why it stays dense.

    Attributes:
        sites: every linear projection of the model, in the model's order.
        made: who made the plan, how and when: free-form strings.
        tensors: what was measured and fitted for the sites; ``{site: {name: tensor}}`` is read as
            one.

    Raises:
        PlanError: if a tensor belongs to no site, or does not fit the shape of its weight.
    """

    sites: Mapping[str, PlannedSite]
    made: Mapping[str, str] = field(default_factory=dict)
    tensors: PlanTensors = field(default_factory=PlanTensors)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", dict(self.sites))
        object.__setattr__(self, "made", dict(self.made))
        if not isinstance(self.tensors, PlanTensors):
            object.__setattr__(self, "tensors", PlanTensors(self.tensors))
        self.tensors.check({name: site.shape for name, site in self.sites.items()})

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

    def to_json(self, tensors: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the plan as plain JSON values, checksum included.

        ``tensors`` says where the tensors lie; without, they are left out.
        """
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "made": dict(self.made),
            **({"tensors": dict(tensors)} if tensors else {}),
            "sites": {name: _site_to_json(site) for name, site in self.sites.items()},
        }
        return {**body, "checksum": _digest(body)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``, its tensors beside it; what was there survives a failure.

        Raises:
            OSError: if the files cannot be written.
            PlanError: if there are tensors, and no safetensors to write them.
        """
        plan_file.save(Path(path), lambda entry: _layout(self.to_json(entry)), self.tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file; its tensors are read when they are asked for.

        Raises:
            PlanError: if one of the files is missing, cut short, edited, of another version, or
                they do not belong together.
        """
        where = f"plan file {os.fspath(path)!r}"
        data, tensors = plan_file.load(Path(path), where)
        return cls.from_json(data, where, tensors)

    @classmethod
    def from_json(
        cls, data: Any, where: str = "the plan", tensors: PlanTensors | None = None
    ) -> Plan:
        """Read what :meth:`to_json` wrote; ``where`` names it in errors.

        Raises:
            PlanError: as :meth:`load`.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"{where} is not an Amber plan: it has no 'format': {FORMAT!r}")
        if data.get("version") not in READS:
            raise PlanError(
                f"{where} has version {data.get('version')!r}; this Amber reads "
                f"{' and '.join(map(str, READS))}"
            )
        body = {key: value for key, value in data.items() if key != "checksum"}
        if data.get("checksum") != _digest(body):
            raise PlanError(
                f"{where} was edited or damaged after it was saved: wrong checksum. Change a plan "
                "in Python: Plan({**plan.sites, name: PlannedSite(...)}).save(path)"
            )
        try:
            sites = {name: _site_from_json(entry) for name, entry in data["sites"].items()}
            return cls(sites, dict(data["made"]), tensors or PlanTensors())
        except PlanError as cause:
            raise PlanError(f"{where}: {cause}") from cause
        except (KeyError, TypeError, ValueError, AttributeError, OptionError) as cause:
            raise PlanError(f"{where} holds an unreadable entry: {cause!r}") from cause

    def diff(self, other: Plan) -> PlanDiff:
        """Return what is different in ``other``: settings, quantisation, tensors, totals."""
        from .plan_diff import PlanDiff  # compares tensors: not needed to compile

        return PlanDiff.of(self, other)


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
    data: dict[str, Any] = {"shape": list(site.shape)}
    if isinstance(site.choice, Settings):
        data["sparse"] = site.choice.to_json()
    else:
        data["dense"] = site.choice
    if isinstance(site.quantization, Quantization):
        data["quantize"] = site.quantization.to_json()
    elif site.quantization is not None:
        data["quantize"] = site.quantization
    if site.moves:
        data["moves"] = [list(astuple(move)) for move in site.moves]
    return data


def _site_from_json(entry: Mapping[str, Any]) -> PlannedSite:
    choice = Settings.from_json(entry["sparse"]) if "sparse" in entry else str(entry["dense"])
    quantized = entry.get("quantize")
    return PlannedSite(
        tuple(int(size) for size in entry["shape"]),
        choice,
        Quantization.from_json(quantized) if isinstance(quantized, Mapping) else quantized,
        tuple(Move(str(name), *map(int, numbers)) for name, *numbers in entry.get("moves", ())),
    )


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
