"""Compile a graph once for each distinct tuple of decisions that its owners' plans make.

A whole model has one owner and one variant. Layers compiled one by one share a graph and, when a
model is registered, may differ in what their plan says: each difference is a variant, compiled
with the others while Dynamo's shapes are at hand, and the weights of a call choose among them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.exc import RestartAnalysis
from torch.fx import GraphModule

from .analysis import Analysis, Decisions, Names
from .binding import Binding, Compiled, Variant
from .config import AmberConfig
from .decision import blocked
from .errors import RewriteError
from .graph import copy_graph
from .owners import Built, Owners
from .report import GraphReport
from .rewrite import rewrite
from .settings import Settings
from .stages import Stages, code_recorded
from .traced import traced

Inner = Callable[[GraphModule, Sequence[Any], AmberConfig, bool], Compiled]
"""Compiles a graph: module, example inputs, options, and whether it holds Amber's operators."""


def compile_variants(
    analysis: Analysis, inner: Inner, report: GraphReport, *, fuse: bool = True
) -> Compiled:
    """Compile every variant of a graph and return the callable that chooses among them.

    Without ``fuse`` selections stay nodes of their own (rewrite.py).

    Raises:
        PlanError: if the plan belongs to another model.
        RewriteError: under ``strict=True``, if a planned projection cannot be sparsified or the
            rewritten graph does not compile.
    """
    started = time.perf_counter()
    owners = {names: analysis.decisions(names) for names in analysis.names}
    _tell_obstacles(analysis, owners)
    report.traced = traced(analysis, owners)
    report.seconds += time.perf_counter() - started
    variants: dict[Sequence[Settings | None], Built] = {}
    for names, decisions in owners.items():
        if _key(decisions) not in variants:
            variants[_key(decisions)] = _compile(analysis, names, decisions, inner, report, fuse)
    built = {names: variants[_key(decisions)] for names, decisions in owners.items()}
    sites = {
        names: analysis.sites(names, _kept(decisions, built[names].failure))
        for names, decisions in owners.items()
    }
    first = built[analysis.names[0]]
    settled = len(owners) == 1 or not any(settings for key in variants for settings in key)
    if settled and first.twin is None and not first.variant.derived:
        report.sites = list({site.name: site for own in sites.values() for site in own}.values())
        return first.variant.compiled
    report.sites = list(sites[analysis.names[0]])
    choose = Owners(analysis, built, sites, report)
    return Binding(choose.watched, choose, choose.dense)


def _compile(
    analysis: Analysis,
    names: Names,
    decisions: Decisions,
    inner: Inner,
    report: GraphReport,
    fuse: bool,
) -> Built:
    """Compile the graph as it is decided for ``names``; dense, and said so, if that fails."""
    failure = None
    started = time.perf_counter()
    stages = Stages(analysis, names, report)
    report.seconds += time.perf_counter() - started
    if any(decision.sparse for decision in decisions):
        try:
            return _compile_sparse(analysis, decisions, inner, report, stages, fuse)
        except RestartAnalysis:  # Dynamo will enter again, knowing more
            raise
        except Exception as cause:
            if analysis.config.strict:
                raise RewriteError(f"the rewritten graph does not compile: {cause}") from cause
            report.fallback = f"{type(cause).__name__}: {cause}"
            warnings.warn(
                "amber: the rewritten graph does not compile, so the dense one runs "
                f"({report.fallback})",
                stacklevel=2,
            )
            failure = f"the rewritten graph does not compile ({report.fallback})"
    # The compiler may change what it is given, and other variants are still to be made of it.
    gm = copy_graph(analysis.gm)[0] if len(analysis.names) > 1 else analysis.gm
    with code_recorded(report):
        return Built(Variant(inner(gm, analysis.inputs, analysis.config, False)), failure)


def _compile_sparse(
    analysis: Analysis,
    decisions: Decisions,
    inner: Inner,
    report: GraphReport,
    stages: Stages,
    fuse: bool,
) -> Built:
    started = time.perf_counter()
    rewritten = rewrite(analysis, decisions, stages, fuse=fuse)
    # The compiler owns what it is given, and may change it.
    twin = rewrite(analysis, decisions, fuse=False) if analysis.config.check else None
    report.seconds += time.perf_counter() - started
    inputs = [*analysis.inputs, *rewritten.values]
    with code_recorded(report):
        compiled = inner(rewritten.gm, inputs, analysis.config, True)
    report.rewritten = max(report.rewritten, len(rewritten.sites))
    return Built(Variant(compiled, rewritten.derived), twin=twin)


def _kept(decisions: Decisions, failure: str | None) -> Decisions:
    """Return what became of ``decisions`` in a variant that may have failed to compile."""
    if failure is None:
        return decisions
    return tuple(blocked(failure) if decision.sparse else decision for decision in decisions)


def _tell_obstacles(analysis: Analysis, owners: Mapping[Names, Decisions]) -> None:
    """Raise under ``strict=True`` for what was planned sparse and cannot be; warn of gradients."""
    obstacles = [
        f"{name}: {decision.reason}"
        for names, decisions in owners.items()
        for name, decision in zip(names, decisions, strict=True)
        if decision.obstacle
    ]
    if obstacles and analysis.config.strict:
        raise RewriteError(
            f"strict=True, and {len(obstacles)} planned projections cannot be sparsified: "
            + "; ".join(obstacles[:5])
        )
    if obstacles and analysis.needs_grad:
        warnings.warn(
            "amber: the graph needs gradients, so it stays dense: call the model under "
            "torch.no_grad() or torch.inference_mode()",
            stacklevel=2,
        )


def _key(decisions: Decisions) -> tuple[Settings | None, ...]:
    return tuple(decision.settings for decision in decisions)
