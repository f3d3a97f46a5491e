"""What was rewritten and why: one entry per projection, for each compiled graph.

A backend call leaves a :class:`GraphReport`; :class:`Report` joins those of one model, so that
every projection stands in its table once. ``str(report)`` is the table.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from .decision import Decision
from .plan import Plan, PlannedSite

KEPT = 64
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

        Heads are not counted, as in the paper: prefill needs them for the last token only.
        """
        return self._share(lambda site: site.share)

    @property
    def removed(self) -> float:
        """Share of the linear multiply-accumulates (but the heads') that meet a dropped zero."""
        return self._share(
            lambda site: (
                site.share * (1 - site.decision.settings.pattern.density)
                if site.decision.settings
                else 0.0
            )
        )

    def _share(self, part: Callable[[Site], float]) -> float:
        counted = [site for site in self.sites if site.role != "head"]
        total = sum(site.macs for site in counted)
        return sum(site.macs * part(site) for site in counted) / total if total else 0.0

    def plan(self, **made: str) -> Plan:
        """Return these decisions as a plan that can be saved, compared and used again."""
        sites = {
            site.name: PlannedSite(site.shape, site.decision.settings or str(site.decision.reason))
            for site in self.sites
        }
        return Plan(sites, {"amber": _version(), **made})

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "coverage": self.coverage,
            "removed": self.removed,
            "graphs": [json.loads(json.dumps(asdict(graph), default=str)) for graph in self.graphs],
        }

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        """Join the reports of several graphs of one model."""
        return cls([graph for report in reports for graph in report.graphs])

    def summary(self) -> str:
        """Return the report in one line."""
        sparse = sum(site.decision.sparse for site in self.sites)
        phases = ", ".join(graph.phase for graph in self.graphs)
        line = (
            f"{sparse} of {len(self.sites)} projections sparse, {self.coverage:.1%} of linear MACs "
            f"covered, {self.removed:.1%} removed ({phases})"
        )
        failures = [graph.fallback for graph in self.graphs if graph.fallback]
        return f"{line}; runs dense: {failures[0]}" if failures else line

    def __str__(self) -> str:
        table = Table(title=f"Amber: {self.summary()}", title_justify="left")
        for heading in ("projection", "weight", "decision", "kernel"):
            table.add_column(heading, overflow="fold")
        measured = any(site.error is not None for site in self.sites)
        if measured:
            table.add_column("error", justify="right")
        for site in self.sites:
            row = [site.name, "x".join(map(str, site.shape)), str(site.decision), site.kernel]
            if measured:
                row.append("" if site.error is None else f"{site.error:.4f}")
            table.add_row(*row)
        out = io.StringIO()
        Console(file=out, width=120).print(table)
        return out.getvalue()


def last_reports() -> list[Report]:
    """Return the reports of the latest compiled graphs, oldest first, one per graph."""
    return list(_reports)


def record(report: Report) -> None:
    """Add a report to :func:`last_reports`."""
    _reports.append(report)


def clear_reports() -> None:
    """Empty :func:`last_reports`."""
    _reports.clear()


def _version() -> str:
    try:
        return version("amber-compile")
    except PackageNotFoundError:  # a checkout on sys.path
        return "checkout"
