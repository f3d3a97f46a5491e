"""The projections that calibration may make sparse: those that the backend can rewrite.

What is possible is asked of the backend itself (explain.py), with the first batch for its inputs.
Everything else is listed with the backend's reason, so that a plan accounts for every linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amber_compile.explain import explain
from amber_compile.pattern import Pattern
from amber_compile.report import Report, Site
from amber_compile.settings import Settings

from .errors import CalibrationError
from .observe import Call, observing, weights_of
from .reading import inputs_of

UNCOUNTED = ("head", "router")
"""Roles that are no part of the coverage (report.py), and never made sparse by calibration."""
NOT_SEEN = "its weight has another name as well, or is multiplied in a way calibration cannot watch"


@dataclass(frozen=True)
class Candidates:
    """The projections of a model.

    Attributes:
        sites: all of them, in the model's order.
        weights: of those that may be sparse, as [N, K] or [E, N, K], however they are stored.
        reasons: why the others stay dense.
        paper: what the paper's rule would do, of those that it makes sparse.
        seen: the weights of all projections but heads and routers, sparse or not.
        inputs: of each of these a number, that those share which read the same.
        total: multiply-accumulates a token of all that count.
    """

    sites: Mapping[str, Site]
    weights: Mapping[str, Tensor]
    reasons: Mapping[str, str]
    paper: Mapping[str, Settings]
    seen: Mapping[str, Tensor]
    inputs: Mapping[str, int]
    total: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Any,
        pattern: Pattern,
        projections: Iterable[str],
        skip: Iterable[str],
        quantize: str | None = None,
    ) -> Candidates:
        """Ask the backend.

        Raises:
            CalibrationError: if no projection may be sparse, with the commonest reason.
        """
        wanted = {"projections": tuple(projections), "skip": tuple(skip), "quantize": quantize}
        possible = _explain(model, batch, pattern=pattern, score="magnitude", **wanted)
        paper = _explain(model, batch, pattern=pattern, preset="paper")
        sites = {site.name: site for site in possible.sites}
        reasons = {name: why for name, site in sites.items() if (why := _why_not(site))}
        seen = _look(model, batch, [name for name in sites if sites[name].role not in UNCOUNTED])
        reasons |= {name: NOT_SEEN for name in sites if name not in {**reasons, **seen}}
        weights = {name: seen[name][0] for name in sites if name not in reasons}
        if not weights:
            raise CalibrationError(f"no projection can be sparse: {_commonest(reasons)}")
        chosen = {site.name: site.decision.settings for site in paper.sites}
        return cls(
            sites=sites,
            weights=weights,
            reasons=reasons,
            paper={name: how for name, how in chosen.items() if how and name in weights},
            seen={name: weight for name, (weight, _) in seen.items()},
            inputs={name: number for name, (_, number) in seen.items()},
            total=sum(round(site.macs) for site in sites.values() if site.role not in UNCOUNTED),
        )

    def macs(self, names: Iterable[str]) -> int:
        """Return the multiply-accumulates a token of some sites."""
        return sum(round(self.sites[name].macs) for name in names)


def _look(model: nn.Module, batch: Any, names: Iterable[str]) -> dict[str, tuple[Tensor, int]]:
    """Run one batch; return the weight of each site as it is multiplied by, and which input."""
    seen: dict[str, tuple[Tensor, int]] = {}
    inputs: list[Tensor] = []  # held, so that no other takes the place of one

    def visit(call: Call) -> Tensor:
        known = next((at for at, x in enumerate(inputs) if x is call.x), len(inputs))
        inputs.extend([call.x] * (known == len(inputs)))
        seen.setdefault(call.name, (call.weight, known))
        return call()

    args, kwargs = inputs_of(batch, model)
    with torch.no_grad(), observing(weights_of(model, names), visit):
        model(*args, **kwargs)
    return seen


def _explain(model: nn.Module, batch: Any, **options: Any) -> Report:
    args, kwargs = inputs_of(batch, model)
    with torch.compiler.set_stance("default"):
        return explain(model, *args, kwargs=kwargs, **options)


def _why_not(site: Site) -> str | None:
    if site.role in UNCOUNTED:
        return f"a {site.role} is not calibrated"
    return None if site.decision.sparse else str(site.decision.reason)


def _commonest(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return "the model has no linear projection"
    told = list(reasons.values())
    most = max(told, key=told.count)
    return f"of {len(told)} projections {told.count(most)} say: {most}"
