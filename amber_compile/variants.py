"""Compile a graph once for each distinct tuple of decisions that its owners' plans make.

A whole model has one owner and one variant. Layers compiled one by one share a graph and, when a
model is registered, may differ in what their plan says: each difference is a variant, compiled
with the others while Dynamo's shapes are at hand, and the weights of a call choose among them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch._dynamo.exc import RestartAnalysis
from torch.fx import GraphModule

from .analysis import Analysis, Decisions, Names
from .binding import Binding, Compiled, Variant
from .config import AmberConfig
from .decision import Decision, unquantized
from .errors import RewriteError
from .graph import copy_graph
from .owners import Built, Owners
from .plan import Plan
from .quantization import Quantization
from .release import matrices_read, refuse_released
from .report import GraphReport
from .rewritten import rewrite_graph
from .settings import Settings
from .stages import Stages, code_recorded
from .traced import traced

Key = tuple[tuple[Settings | None, Quantization | None], ...]
"""What owners must agree in to share a variant."""
Inner = Callable[[GraphModule, Sequence[Any], AmberConfig, bool], Compiled]
"""Compiles a graph: module, example inputs, options, and whether it holds Amber's operators."""


def compile_variants(
    analysis: Analysis,
    inner: Inner,
    report: GraphReport,
    *,
    fuse: bool = True,
    release: bool = False,
) -> Compiled:
    """Compile every variant of a graph and return the callable that chooses among them.

    Without ``fuse`` selections stay nodes of their own (rewritten.py). With ``release`` the weights
    that ``decode=`` makes superfluous are released (release.py).

    Raises:
        PlanError: if the plan belongs to another model.
        ReleasedError: if the graph reads a weight that was released.
        RewriteError: under ``strict=True``, if a planned projection cannot be sparsified or the
            rewritten graph does not compile.
    """
    started = time.perf_counter()
    owners = {names: analysis.decisions(names) for names in analysis.names}
    tell_obstacles(analysis, owners)
    report.traced = traced(analysis, owners)
    report.plan = analysis.config.plan if isinstance(analysis.config.plan, Plan) else None
    report.seconds += time.perf_counter() - started
    variants: dict[Key, Built] = {}
    for names, decisions in owners.items():
        if _key(decisions) not in variants:
            variants[_key(decisions)] = _compile(analysis, names, decisions, inner, report, fuse)
    built = {names: variants[_key(decisions)] for names, decisions in owners.items()}
    sites = {
        names: analysis.sites(names, _kept(decisions, built[names].failure), built[names].smoothing)
        for names, decisions in owners.items()
    }
    first = built[analysis.names[0]]
    settled = len(owners) == 1 or not any(one.rewritten for own in owners.values() for one in own)
    release = release and analysis.config.decode is not None
    if settled and first.twin is None and not first.variant.derived and not release:
        refuse_released([analysis.inputs[at] for at in first.variant.reads])
        report.sites = list({site.name: site for own in sites.values() for site in own}.values())
        return first.variant.compiled
    report.sites = list(sites[analysis.names[0]])
    choose = Owners(analysis, built, sites, report, release)
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
    if any(decision.rewritten for decision in decisions):
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
    reads = matrices_read(gm)
    with code_recorded(report):
        compiled = inner(gm, analysis.inputs, analysis.config, False)
    return Built(Variant(compiled, reads=reads), failure)


def _compile_sparse(
    analysis: Analysis,
    decisions: Decisions,
    inner: Inner,
    report: GraphReport,
    stages: Stages,
    fuse: bool,
) -> Built:
    started = time.perf_counter()
    rewritten = rewrite_graph(analysis, decisions, stages, fuse=fuse)
    # The compiler owns what it is given, and may change it.
    twin = rewrite_graph(analysis, decisions, fuse=False) if analysis.config.check else None
    report.seconds += time.perf_counter() - started
    inputs = [*analysis.inputs, *rewritten.values]
    with code_recorded(report):
        compiled = inner(rewritten.gm, inputs, analysis.config, True)
    report.rewritten = max(report.rewritten, rewritten.changed)
    variant = Variant(compiled, rewritten.derived, rewritten.reads)
    return Built(variant, twin=twin, smoothing=rewritten.smoothing)


def _kept(decisions: Decisions, failure: str | None) -> Decisions:
    """Return what became of ``decisions`` in a variant that may have failed to compile."""
    if failure is None:
        return decisions
    return tuple(_kept_dense(decision, failure) for decision in decisions)


def _kept_dense(decision: Decision, failure: str) -> Decision:
    if decision.quantization is not None:
        decision = unquantized(decision, failure)
    if not decision.sparse:
        return decision
    return replace(decision, settings=None, reason=failure, obstacle=True)


def tell_obstacles(analysis: Analysis, owners: Mapping[Names, Decisions]) -> None:
    """Raise under ``strict=True`` for what was planned sparse and cannot be; warn of gradients."""
    obstacles = [
        f"{name}: {reason}"
        for names, decisions in owners.items()
        for name, decision in zip(names, decisions, strict=True)
        for reason in _obstacles(decision)
    ]
    if obstacles and analysis.config.strict:
        raise RewriteError(
            f"strict=True, and {len(obstacles)} planned projections cannot be rewritten: "
            + "; ".join(obstacles[:5])
        )
    if obstacles and analysis.needs_grad:
        warnings.warn(
            "amber: the graph needs gradients, so it stays dense: call the model under "
            "torch.no_grad() or torch.inference_mode()",
            stacklevel=2,
        )


def _obstacles(decision: Decision) -> Iterator[str | None]:
    if decision.obstacle:
        yield decision.reason
    if decision.unquantized_obstacle:
        yield decision.unquantized


def _key(decisions: Decisions) -> Key:
    return tuple((decision.settings, decision.quantization) for decision in decisions)
