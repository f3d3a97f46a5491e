"""Write down what calibration decided: a plan, with who made it, when, from what, at what cost."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from amber_compile.plan import Plan, PlannedSite
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization

from .allocation import Settled
from .candidates import Candidates
from .choosing import Choice
from .options import CalibrationOptions
from .ordering import Orders


@dataclass(frozen=True)
class Calibration:
    """A plan, and what was measured on the way to it.

    Attributes:
        plan: what to compile with.
        settled: the sparse sites and their damage together.
        paper: the damage of the paper's method on the same text, where it was measured.
        choices: the measured ways of every candidate, chosen or not.
        candidates: the projections of the model.
        seconds: how long it took.
    """

    plan: Plan
    settled: Settled
    paper: float | None
    choices: Mapping[str, list[Choice]]
    candidates: Candidates
    seconds: float

    @property
    def coverage(self) -> float:
        """Share of the linear multiply-accumulates that is sparse."""
        return self.settled.macs / self.candidates.total

    def to_json(self) -> dict[str, Any]:
        """Return everything but tensors as plain JSON values."""
        sites = [self._row(name) for name in self.candidates.sites]
        return {
            "made": dict(self.plan.made),
            "coverage": self.coverage,
            "damage": self.settled.measured.mean,
            "damage_se": self.settled.measured.error,
            "paper_damage": self.paper,
            "seconds": self.seconds,
            "sites": sites,
        }

    def _row(self, name: str) -> dict[str, Any]:
        site, planned = self.candidates.sites[name], self.plan.sites[name]
        ways = [
            {"how": str(one.sparse.settings), "macs": one.macs, **vars(one.measured)}
            for one in self.choices.get(name, [])
        ]
        sparse = not isinstance(planned.choice, str)
        return {
            "name": name,
            "shape": list(site.shape),
            "role": site.role,
            "sparse": str(planned.choice) if sparse else None,
            "dense": None if sparse else planned.choice,
            "ways": ways,
        }


@dataclass(frozen=True)
class Provenance:
    """Who, what and when: the strings that a plan carries."""

    options: CalibrationOptions
    facts: Mapping[str, Any]
    tokens: tuple[int, int]
    extra: Mapping[str, str] = field(default_factory=dict)

    def told(self, candidates: Candidates, settled: Settled, plan_bytes: int) -> dict[str, str]:
        """Return the strings."""
        kinds = {"dtype": str(next(iter(candidates.weights.values())).dtype)}
        return {
            "by": "amber calibrate",
            "amber": _version("amber-compile"),
            "torch": torch.__version__,
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": f"{self.facts['model']}, {kinds['dtype']}",
            "data": str(self.facts["data"]),
            "tokens": f"{self.tokens[0]} fitted, {self.tokens[1]} held out",
            "options": json.dumps(self.options.to_json()),
            "coverage": f"{settled.macs / candidates.total:.4f}",
            "damage": f"{settled.measured} a token, held out",
            "second weights": f"{plan_bytes} bytes",
            **self.extra,
        }


def make_plan(
    candidates: Candidates,
    settled: Settled,
    provenance: Provenance,
    quantized: Mapping[str, Quantization | str] | None = None,
    smooth: Mapping[str, Tensor] | None = None,
    orders: Orders | None = None,
) -> Plan:
    """Return the plan: every site of the model, sparse or with the reason why not."""
    orders = orders or Orders()
    tensors: dict[str, dict[str, Tensor]] = {}
    sites = {}
    for name, site in candidates.sites.items():
        choice = settled.chosen.get(name)
        sparse = orders.sparse(name, choice.sparse) if choice else None
        kinds = sparse.settings.tensors if sparse else ()
        tensors[name] = {**orders.tensors.get(name, {})}
        tensors[name] |= {kind: sparse.tensors[kind].cpu() for kind in kinds if sparse}
        if smooth and name in smooth:
            tensors[name]["smooth"] = smooth[name].cpu()
        reason = candidates.reasons.get(name, "calibration: its damage is not worth its share")
        sites[name] = PlannedSite(
            site.shape,
            sparse.settings if sparse else reason,
            (quantized or {}).get(name),
            tuple(orders.moves.get(name, ())),
        )
    held = {name: own for name, own in tensors.items() if own}
    second = sum(own["weight"].nbytes for own in held.values() if "weight" in own)
    return Plan(sites, provenance.told(candidates, settled, second), PlanTensors(held))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "checkout"
