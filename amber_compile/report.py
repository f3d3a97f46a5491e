"""What was rewritten and why: one entry per projection, for each compiled graph.

A backend call leaves a :class:`GraphReport`; :class:`Report` joins those of one model, so that
every projection stands in its table once. ``str(report)`` is the table (table.py). Of a whole
model (explain.py) a report knows more: the linears that no graph holds, and every graph break.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .breaks import Break, distinct
from .debug.output_error import OutputError, level, number
from .memory import Memory
from .plan import BY_PLAN, Plan, PlannedSite
from .plan_tensors import PlanTensors
from .site import Site as Site
from .sketch import Stage
from .table import break_list, site_table, worst_list

if TYPE_CHECKING:
    from .traced import Traced

KEPT = 512
"""How many compiled graphs :func:`last_reports` remembers."""

_reports: deque[Report] = deque(maxlen=KEPT)


UNWRITTEN = ("traced", "plan")
"""What is known of a graph and is not JSON."""


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        phase: ``prefill``, ``decode`` or ``unknown``.
        sites: its projections in execution order.
        rewritten: number of matmul nodes that read a selection or are quantised.
        seconds: time of analysis and rewriting, without the compilation behind it.
        fallback: why the rewritten graph could not be compiled and the dense one runs, if so.
        output_error: relative error of the graph's outputs on the first call (``check=True``).
        stages: the graph as it was traced, and after each pass that changed it.
        code_files: where Inductor's generated code lay when it was compiled.
        broken: the graph break that ended the graph, if one did.
        traced: what rebuilds it (:meth:`Report.save_reproducer`), where something was to be sparse.
        plan: what decided its projections, if a plan did.
    """

    phase: str
    sites: list[Site] = field(default_factory=list)
    rewritten: int = 0
    seconds: float = 0.0
    fallback: str | None = None
    output_error: float | None = None
    stages: list[Stage] = field(default_factory=list)
    code_files: list[str] = field(default_factory=list)
    broken: Break | None = None
    traced: Traced | None = field(default=None, repr=False)
    plan: Plan | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the graph's report as plain JSON values."""
        sites = [site.to_json() for site in self.sites]
        stages = [stage.to_json() for stage in self.stages]
        return {
            **{name: value for name, value in vars(self).items() if name not in UNWRITTEN},
            "sites": sites,
            "stages": stages,
            "output_error": number(self.output_error),
            "broken": self.broken.to_json() if self.broken else None,
        }


@dataclass
class Report:
    """The graphs of one model, and its projections, each once.

    Attributes:
        graphs: in the order of their compilation.
        outside: linears of the model that no graph holds, dense and each with its reason.
        unended: graph breaks that ended no graph, because nothing was traced before them.
        explained: how the model was looked at, in a sentence; empty for a run of its own.
        output: error of the whole model's output, where that was measured (compare.py).
    """

    graphs: list[GraphReport] = field(default_factory=list)
    outside: list[Site] = field(default_factory=list)
    unended: list[Break] = field(default_factory=list)
    explained: str = ""
    output: OutputError | None = None

    @property
    def breaks(self) -> list[Break]:
        """Every graph break once."""
        return distinct([*(graph.broken for graph in self.graphs), *self.unended])

    @property
    def sites(self) -> list[Site]:
        """Every projection once: as a prefill graph decided it, where one did."""
        found: dict[str, Site] = {}
        for graph in sorted(self.graphs, key=lambda graph: graph.phase == "decode"):
            for site in graph.sites:
                held = found.setdefault(site.name, site)
                if site.level > held.level:
                    found[site.name] = site
        for site in self.outside:
            found.setdefault(site.name, site)
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

    @property
    def quantized(self) -> float:
        """Share of the same multiply-accumulates that run in eight bits, 0 to 1."""
        return self._share(lambda site: site.decision.quantization is not None)

    @property
    def memory(self) -> Memory:
        """What the weights of the projections occupy, before and after."""
        released = {site.name for graph in self.graphs for site in graph.sites if site.released}
        return Memory.of(self.sites, released)

    def _share(self, part: Callable[[Site], float]) -> float:
        counted = [site for site in self.sites if site.role not in ("head", "router")]
        total = sum(site.macs for site in counted)
        return sum(site.macs * part(site) for site in counted) / total if total else 0.0

    def worst(self, count: int = 10) -> list[Site]:
        """Return the ``count`` measured sites of the largest error, the largest first."""
        measured = [site for site in self.sites if site.error is not None]
        return sorted(measured, key=lambda site: level(site.error), reverse=True)[:count]

    def plan(self, **made: str) -> Plan:
        """Return these decisions as a plan that can be saved, compared and used again.

        What another plan had calibrated for a site goes with it.
        """
        sites = {}
        plans = list({graph.plan: None for graph in self.graphs if graph.plan})
        for site in self.sites:
            decision = site.decision
            choice = decision.settings or str(decision.reason).removeprefix(BY_PLAN)
            wide = decision.unquantized and decision.unquantized.removeprefix(BY_PLAN)
            held = next((plan.sites[site.name] for plan in plans if site.name in plan.sites), None)
            moves = held.moves if held else ()
            kept = decision.quantization or wide
            sites[site.name] = PlannedSite(site.shape, choice, kept, moves)
        tensors = plans[0].tensors if len(plans) == 1 else _merged(plans)
        return Plan(sites, {"amber": _version(), **made}, tensors=tensors)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "amber": _version(),
            "coverage": self.coverage,
            "removed": self.removed,
            "quantized": self.quantized,
            "memory": self.memory.to_json(),
            "sites": [site.to_json() for site in self.sites],
            "graphs": [graph.to_json() for graph in self.graphs],
            "breaks": [one.to_json() for one in self.breaks],
            "explained": self.explained,
            "output": self.output.to_json() if self.output else None,
        }

    def to_html(self, path: str | PathLike[str], title: str = "Amber report") -> None:
        """Write the report as one page that needs nothing else, no network either, to ``path``.

        Raises:
            ImportError: without jinja2 or networkx, which PyTorch brings.
        """
        from .page import page_of  # templates and layout: not needed to compile

        Path(path).write_text(page_of(self, title), encoding="utf-8")

    def save_reproducer(self, folder: str | PathLike[str], backend: str | None = None) -> None:
        """Write a script to ``folder`` that rebuilds the graphs with random weights and runs them.

        It needs torch and Amber only, and holds the graphs' code, names, shapes and options, but
        no weight and no input: to attach to a bug report. Start it by ``python reproduce.py``.
        ``backend``: ``"amber"`` or ``"amber_eager"``; by default as the graphs were compiled.

        Raises:
            OptionError: for another backend.
            ReproducerError: if no graph can be rebuilt, with the reason for each.
        """
        from .debug.reproducer import save_reproducer  # writes code: not needed to compile

        save_reproducer(self, Path(folder), backend)

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        """Join the reports of several graphs of one model."""
        joined = cls()
        for report in reports:
            joined.graphs += report.graphs
            joined.outside += report.outside
            joined.unended += report.unended
            joined.explained = joined.explained or report.explained
            joined.output = joined.output or report.output
        return joined

    def summary(self) -> str:
        """Return the report in one line."""
        if not self.graphs:
            return f"no graph was compiled{self._broken()}"
        sparse = sum(site.decision.sparse for site in self.sites)
        quantized = sum(site.decision.quantization is not None for site in self.sites)
        phases = Counter(graph.phase for graph in self.graphs)
        line = (
            f"{sparse} of {len(self.sites)} projections sparse, {self.coverage:.1%} of linear MACs "
            f"covered, {self.removed:.1%} removed; "
            + f"{quantized} quantised, {self.quantized:.1%} of linear MACs; " * (quantized > 0)
            + "graphs: "
            + ", ".join(f"{count} {phase}" for phase, count in phases.items())
            + self._broken()
        )
        failures = [graph.fallback for graph in self.graphs if graph.fallback]
        return f"{line}; runs dense: {' '.join(failures[0].split())}" if failures else line

    def _broken(self) -> str:
        """Return the number of graph breaks for :meth:`summary`; none is worth telling if known."""
        count = len(self.breaks)
        if not count:
            return "; no graph breaks" if self.explained else ""
        return f"; {count} graph break{'s' * (count > 1)}"

    def __str__(self) -> str:
        output = f"output error: {self.output}" if self.output else ""
        memory = self.memory.text(estimated=bool(self.explained))
        lines = [f"Amber: {self.summary()}", self.explained, memory, output]
        title = "\n".join(filter(None, lines))
        parts = [title]
        if self.breaks:
            parts.append(break_list(self.breaks))
        if worst := self.worst():
            parts.append(worst_list(worst))
        if self.sites:
            parts.append(site_table(self.sites))
        return "\n\n".join(parts)


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


def _merged(plans: Sequence[Plan]) -> PlanTensors:
    """Return the tensors of several plans; of a site in two, those of the first."""
    found: dict[str, Mapping[str, torch.Tensor]] = {}
    for plan in plans:
        for site, own in plan.tensors.to_dict().items():
            found.setdefault(site, own)
    return PlanTensors(found)
