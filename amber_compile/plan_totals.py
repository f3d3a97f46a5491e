"""What a plan comes to: how much of a model is sparse, how much quantised, how large its tensors.

Shares are of the linear weights, without heads and routers, as in the paper: of a dense model those
are its multiply-accumulates. Of an MoE the plan does not know how many experts a token sees; every
expert counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .plan import Plan, PlannedSite
from .quantization import Quantization
from .rule import role_of
from .settings import Settings


@dataclass(frozen=True, slots=True)
class PlanTotals:
    """The totals of a plan.

    Attributes:
        sites: projections it speaks of.
        sparse: of these, how many are sparse.
        quantized: how many are quantised.
        coverage: share of the linear weights that meet a sparse activation, 0 to 1.
        removed: share of them that meet a dropped zero.
        quantized_share: share of them that are quantised.
        tensors: how many tensors it has.
        nbytes: their size.
        weight_bytes: of these, second weights for prefill.
    """

    sites: int
    sparse: int
    quantized: int
    coverage: float
    removed: float
    quantized_share: float
    tensors: int
    nbytes: int
    weight_bytes: int

    @classmethod
    def of(cls, plan: Plan) -> PlanTotals:
        """Add up ``plan``."""
        sites = list(plan.sites.values())
        return cls(
            sites=len(sites),
            sparse=sum(isinstance(site.choice, Settings) for site in sites),
            quantized=sum(isinstance(site.quantization, Quantization) for site in sites),
            coverage=_share(plan, sparse_share),
            removed=_share(plan, _removed),
            quantized_share=_share(plan, lambda site: isinstance(site.quantization, Quantization)),
            tensors=len(plan.tensors),
            nbytes=plan.tensors.nbytes,
            weight_bytes=plan.tensors.bytes_of("weight"),
        )

    def lines(self) -> list[tuple[str, str]]:
        """Return the totals for people: what, how much."""
        return [
            ("projections", f"{self.sites}"),
            ("sparse", f"{self.sparse}, {self.coverage:.1%} of the linear weights"),
            ("removed", f"{self.removed:.1%} of the linear weights"),
            ("quantised", f"{self.quantized}, {self.quantized_share:.1%} of the linear weights"),
            ("tensors", f"{self.tensors}, {size(self.nbytes)}"),
            ("second weights", size(self.weight_bytes)),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the totals as plain JSON values."""
        return asdict(self)


def sparse_share(site: PlannedSite) -> float:
    """Return the part of a site's outputs that reads a sparse activation."""
    if not isinstance(site.choice, Settings):
        return 0.0
    return 0.5 if site.choice.part == "gate" else 1.0


def size(nbytes: int) -> str:
    """Return a number of bytes for people: 20.2 MB."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= one:
            return f"{nbytes / one:.1f} {unit}"
    return f"{nbytes} bytes"


def _removed(site: PlannedSite) -> float:
    density = site.choice.pattern.density if isinstance(site.choice, Settings) else 1.0
    return sparse_share(site) * (1 - density)


def _share(plan: Plan, part: Callable[[PlannedSite], float]) -> float:
    counted = [
        (math.prod(site.shape), part(site))
        for name, site in plan.sites.items()
        if role_of(name) not in ("head", "router")
    ]
    total = sum(weights for weights, _ in counted)
    return sum(weights * share for weights, share in counted) / total if total else 0.0
