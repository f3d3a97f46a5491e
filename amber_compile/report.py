"""What was rewritten and why: one entry per projection, for each compiled graph.

A backend call leaves a :class:`GraphReport`; :class:`Report` joins those of one model, so that
every projection stands in its table once. ``str(report)`` is the table (table.py).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .decision import Decision
from .plan import BY_PLAN, Plan, PlannedSite
from .table import site_table

KEPT = 512
"""How many compiled graphs :func:`last_reports` remembers."""

_reports: deque[Report] = deque(maxlen=KEPT)


@dataclass
class Site:
    """One projection of a graph and what became of it.

    Attributes:
        name: qualified name of the call site.
        shape: of its weight, ``(N, K)`` or ``(E, N, K)``.
        macs: multiply-accumulates per token (experts: per routed token and active expert).
        operator: how the graph spells it.
        decision: sparse with which settings, or dense for which reason.
        role: what its name says it is: ``q``, ``gate``, ``down``, ``head`` ...
        share: part of its outputs that reads a sparse activation, 0 to 1.
        kernel: what runs the selection, for sparse sites.
        error: relative output error ‖Y - Y'‖ / ‖Y‖ on the first call, under ``check=True``.
    """

    name: str
    shape: tuple[int, ...]
    macs: float
    operator: str
    decision: Decision
    role: str = "unknown"
    share: float = 0.0
    kernel: str = ""
    error: float | None = None

    def called_again(self, other: Site) -> Site:
        """Return the site of a projection that the graph calls a second time, as ``other``."""
        macs = self.macs + other.macs
        shared = self.macs * self.share + other.macs * other.share
        shown = self if self.decision.sparse else other
        return replace(shown, macs=macs, share=shared / macs if macs else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the site as plain JSON values: ``sparse`` are its settings, or None."""
        settings = self.decision.settings
        return {
            **{name: value for name, value in vars(self).items() if name != "decision"},
            "shape": list(self.shape),
            "sparse": settings.to_json() if settings else None,
            "dense": self.decision.reason,
            "obstacle": self.decision.obstacle,
            "error": _number(self.error),
        }


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        phase: ``prefill``, ``decode`` or ``unknown``.
        sites: its projections in execution order.
        rewritten: number of matmul nodes that read a selection.
        seconds: time of analysis and rewriting, without the compilation behind it.
        fallback: why the rewritten graph could not be compiled and the dense one runs, if so.
        output_error: relative error of the graph's outputs on the first call (``check=True``).
    """

    phase: str
    sites: list[Site] = field(default_factory=list)
    rewritten: int = 0
    seconds: float = 0.0
    fallback: str | None = None
    output_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the graph's report as plain JSON values."""
        sites = [site.to_json() for site in self.sites]
        return {**vars(self), "output_error": _number(self.output_error), "sites": sites}


@dataclass
class Report:
    """The graphs of one model, and its projections, each once."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """Every projection once: as a prefill graph decided it, where one did."""
        found: dict[str, Site] = {}
        for graph in sorted(self.graphs, key=lambda graph: graph.phase == "decode"):
            for site in graph.sites:
                held = found.setdefault(site.name, site)
                if site.decision.sparse and not held.decision.sparse:
                    found[site.name] = site
        return list(found.values())

    @property
    def coverage(self) -> float:
        """Share of the linear multiply-accumulates that read a sparse activation, 0 to 1.

        As in the paper, heads and routers are not counted: prefill needs a head for the last token
        only, and a router is a thousandth of a layer.
        """
        return self._share(lambda site: site.share)

    @property
    def removed(self) -> float:
        """Share of the same multiply-accumulates that meet a dropped zero, 0 to 1."""
        return self._share(lambda site: site.share * (1 - site.decision.density))

    def _share(self, part: Callable[[Site], float]) -> float:
        counted = [site for site in self.sites if site.role not in ("head", "router")]
        total = sum(site.macs for site in counted)
        return sum(site.macs * part(site) for site in counted) / total if total else 0.0

    def plan(self, **made: str) -> Plan:
        """Return these decisions as a plan that can be saved, compared and used again."""
        sites = {}
        for site in self.sites:
            reason = str(site.decision.reason).removeprefix(BY_PLAN)
            sites[site.name] = PlannedSite(site.shape, site.decision.settings or reason)
        return Plan(sites, {"amber": _version(), **made})

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "amber": _version(),
            "coverage": self.coverage,
            "removed": self.removed,
            "sites": [site.to_json() for site in self.sites],
            "graphs": [graph.to_json() for graph in self.graphs],
        }

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        """Join the reports of several graphs of one model."""
        return cls([graph for report in reports for graph in report.graphs])

    def summary(self) -> str:
        """Return the report in one line."""
        if not self.graphs:
            return "no graph was compiled"
        sparse = sum(site.decision.sparse for site in self.sites)
        phases = Counter(graph.phase for graph in self.graphs)
        line = (
            f"{sparse} of {len(self.sites)} projections sparse, {self.coverage:.1%} of linear MACs "
            f"covered, {self.removed:.1%} removed; graphs: "
            + ", ".join(f"{count} {phase}" for phase, count in phases.items())
        )
        failures = [graph.fallback for graph in self.graphs if graph.fallback]
        return f"{line}; runs dense: {' '.join(failures[0].split())}" if failures else line

    def __str__(self) -> str:
        title = f"Amber: {self.summary()}"
        return f"{title}\n\n{site_table(self.sites)}" if self.sites else title


def last_reports() -> list[Report]:
    """Return the reports of the latest compiled graphs, oldest first, one per graph."""
    return list(_reports)


def record(report: Report) -> None:
    """Add a report to :func:`last_reports`."""
    _reports.append(report)


def clear_reports() -> None:
    """Empty :func:`last_reports`."""
    _reports.clear()


def _number(value: float | None) -> float | str | None:
    """Return what JSON has for ``value``: it knows neither infinity nor NaN."""
    return value if value is None or math.isfinite(value) else str(value)


def _version() -> str:
    try:
        return version("amber-compile")
    except PackageNotFoundError:  # a checkout on sys.path
        return "checkout"
