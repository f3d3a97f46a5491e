"""Run a model up to a step of its compilation, with some of its sites sparse and the rest dense.

    dense ─► method ─► kernels ─► fuse_projections ─► code generation

    method             selections and codes by their reference: the method's own error
    kernels            the same graph with the kernels of this machine
    fuse_projections   products on sparse units, where there are some
    code generation    the rewritten graph through Inductor, or another compiler

Dynamo traces the model once for all runs but those that generate code.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from amber_compile.binding import Compiled
from amber_compile.config import AmberConfig
from amber_compile.kernels.nm_select import nm_select_reference
from amber_compile.kernels.quantize_rows import quantize_rows_reference
from amber_compile.kernels.quantized_linear import quantized_linear_reference
from amber_compile.naming import registered
from amber_compile.plan import Plan, PlannedSite
from amber_compile.report import Report
from amber_compile.variants import Inner

from .compare import Rewriter, uncompiled
from .replay import Call

Names = Sequence[str]
KEPT = ("min_tokens", "mode", "inductor")
"""The options that go with a plan and are no part of it."""
REFERENCES: dict[Any, Any] = {
    torch.ops.amber.nm_select.default: nm_select_reference,
    torch.ops.amber.quantize_rows.default: quantize_rows_reference,
    torch.ops.amber.quantized_linear.default: quantized_linear_reference,
}
"""Of the operators in a graph whose nodes are not fused."""


class StepFailed(Exception):
    """A step failed to compile or to run; the message is its error's."""


class _Retold:
    """A backend that leaves rewriting to the calls, each by the ``rewriter`` of its time."""

    def __init__(self) -> None:
        self.rewriter: Rewriter | None = None

    def graph(self, gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Return what rewrites ``gm`` whenever the rewriter has changed, then runs it."""
        made: list[tuple[Rewriter, Compiled]] = []

        def run(*arguments: Any) -> Any:
            rewriter = self.rewriter
            assert rewriter is not None
            if not made or made[0][0] is not rewriter:
                made[:] = [(rewriter, rewriter.graph(gm, inputs))]
            return made[0][1](*arguments)

        return run


class PartialRuns:
    """Runs the model up to a step, with some of the planned sites sparse.

    Attributes:
        planned: names of the sites that the options make sparse, in execution order.
        ranked: the same, the largest error of its own first.
        count: how often the model ran.
    """

    def __init__(
        self,
        call: Call,
        config: AmberConfig,
        compiler: Inner | None,
        advance: Callable[[], object],
    ) -> None:
        self._call = call
        self._config = config
        self._advance = advance
        self._retold = _Retold()
        self._run: Callable[[], Any] = lambda: None
        self._sites: dict[str, PlannedSite] = {}
        self._fused = False
        self._dense: list[Any] = []
        self.planned: list[str] = []
        self.ranked: list[str] = []
        self.count = 0
        self._inners: dict[str, Inner] = {"method": _by_reference, "kernels": uncompiled}
        self._inners["fuse_projections"] = uncompiled
        if compiler is not None:
            self._inners["code generation"] = compiler

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Keep the trace that all runs without generated code share, to the end of the block."""
        unlimited = torch._dynamo.config.patch(recompile_limit=1 << 20)
        with registered(self._call.model), unlimited, self._call.traced(self._retold.graph) as run:
            self._run = run
            yield

    @property
    def steps(self) -> list[str]:
        """The steps that this model has; known once :meth:`plan` has run."""
        return [name for name in self._inners if name != "fuse_projections" or self._fused]

    def plan(self) -> None:
        """Find out what the options rewrite, and how the sites rank by their own error."""
        rewriter = Rewriter(replace(self._config, decode=None, check=True), self._counted)
        self._traced(rewriter)
        report = Report(rewriter.graphs)
        self.planned = [site.name for site in report.sites if site.decision.rewritten]
        self.ranked = [site.name for site in report.worst(len(self.planned))]
        self._sites = {
            name: PlannedSite(shape, "not called") for name, shape in rewriter.shapes.items()
        }
        self._sites |= report.plan().sites

    def output(self, step: str, names: Names) -> Any:
        """Return the model's output up to ``step`` with the sites ``names`` sparse.

        Raises:
            StepFailed: if something fails on the way.
        """
        if step == "dense":
            if not self._dense:
                self._count()
                self._dense.append(self._call.dense())
            return self._dense[0]
        fuse = step not in ("method", "kernels")
        rewriter = Rewriter(self._only(names), self._inners[step], fuse=fuse)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "amber: the rewritten graph does not compile")
                run = self._generated if step == "code generation" else self._traced
                output = run(rewriter)
        except Exception as cause:  # whatever a compiler or a kernel raises
            raise StepFailed(f"{type(cause).__name__}: {cause}") from cause
        failures = [graph.fallback for graph in rewriter.graphs if graph.fallback]
        if failures:
            raise StepFailed(failures[0])
        return output

    def _only(self, names: Names) -> AmberConfig:
        """Return options that rewrite the sites ``names`` as planned, and leave others dense."""
        given = self._config.plan
        own = given if isinstance(given, Plan) else Plan({})
        known = {**own.sites, **self._sites}
        chosen = set(names)
        sites = {
            name: site if name in chosen else PlannedSite(site.shape, "left out of this run")
            for name, site in known.items()
        }
        kept = {name: value for name, value in vars(self._config).items() if name in KEPT}
        return AmberConfig(plan=Plan(sites, tensors=own.tensors), **kept)

    def _traced(self, rewriter: Rewriter) -> Any:
        """Run the graphs of the one trace, rewritten by ``rewriter``."""
        self._count()
        self._retold.rewriter = rewriter
        return self._run()

    def _generated(self, rewriter: Rewriter) -> Any:
        """Run graphs of their own: a compiler wants to be called while Dynamo traces."""
        self._count()
        return self._call.through(rewriter.graph)

    def _count(self) -> None:
        self.count += 1
        self._advance()

    def _counted(
        self, gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
    ) -> Compiled:
        """Run a graph as it is, and take down whether anything was fused."""
        fused = gm.graph.find_nodes(op="call_function", target=torch.ops.amber.nm_linear.default)
        self._fused = self._fused or bool(fused)
        return uncompiled(gm, inputs, config, rewritten)


def _by_reference(
    gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
) -> Compiled:
    """Run a graph with the reference of every selection, quantisation and quantised product."""
    if rewritten:
        for node in gm.graph.nodes:
            node.target = REFERENCES.get(node.target, node.target)
        gm.recompile()
    return uncompiled(gm, inputs, config, rewritten)
