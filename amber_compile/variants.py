"""Compile a graph once for each distinct tuple of decisions that its owners' plans make.

A whole model has one owner and one variant. Layers compiled one by one share a graph and, when a
model is registered, may differ in what their plan says: each difference is a variant, compiled
with the others while Dynamo's shapes are at hand, and the weights of a call choose among them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from .binding import Binding, Compiled, Variant
from .check import Checked
from .config import AmberConfig
from .errors import OptionError, RewriteError
from .graph import copy_graph
from .naming import full_name
from .report import GraphReport, Site
from .rewrite import Analysis, Decisions, Names, rewrite
from .settings import Settings

Inner = Callable[[GraphModule, Sequence[Any], AmberConfig, bool], Compiled]
"""Compiles a graph: module, example inputs, options, and whether it holds Amber's operators."""


def compile_variants(analysis: Analysis, inner: Inner, report: GraphReport) -> Compiled:
    """Compile every variant of a graph and return the callable that chooses among them.

    Raises:
        PlanError: if the plan belongs to another model.
        RewriteError: under ``strict=True``, if a planned projection cannot be sparsified or the
            rewritten graph does not compile.
    """
    started = time.perf_counter()
    owners = {names: analysis.decisions(names) for names in analysis.names}
    if analysis.config.strict:
        _refuse_obstacles(owners)
    report.seconds += time.perf_counter() - started
    report.sites = analysis.sites(analysis.names[0], owners[analysis.names[0]])
    variants: dict[Sequence[Settings | None], Variant] = {}
    for decisions in owners.values():
        if _key(decisions) not in variants:
            variants[_key(decisions)] = _compile(analysis, decisions, inner, report)
    if len(owners) == 1 and not any(variant.derived for variant in variants.values()):
        return next(iter(variants.values())).compiled
    choose = _Owners(
        local=tuple(projection.name for projection in analysis.projections),
        variants={names: variants[_key(decisions)] for names, decisions in owners.items()},
        sites={names: analysis.sites(names, decisions) for names, decisions in owners.items()},
        dense=copy_graph(analysis.gm)[0].forward if len(owners) > 1 else None,
        report=report,
    )
    return Binding(analysis.positions, choose)


@dataclass(frozen=True)
class _Owners:
    """Tell whose weights a call brings, and so which variant it runs; holds no weight itself."""

    local: Names
    variants: Mapping[Names, Variant]
    sites: Mapping[Names, Sequence[Site]]
    dense: Compiled | None
    report: GraphReport

    def __call__(self, weights: Sequence[torch.Tensor]) -> Variant:
        if self.dense is None:
            return next(iter(self.variants.values()))
        names = tuple(map(full_name, self.local, weights))
        if names not in self.variants:
            warnings.warn(
                f"amber: {names[0]} and its neighbours belong to no registered model: they run "
                "dense and uncompiled. Call amber_compile.register_model(model) before compiling",
                stacklevel=2,
            )
            return Variant(self.dense)
        known = {site.name for site in self.report.sites}
        self.report.sites += [site for site in self.sites[names] if site.name not in known]
        return self.variants[names]


def _compile(
    analysis: Analysis, decisions: Decisions, inner: Inner, report: GraphReport
) -> Variant:
    """Compile the graph under ``decisions``; dense, and said so, if that fails."""
    if any(decision.sparse for decision in decisions):
        try:
            return _compile_sparse(analysis, decisions, inner, report)
        except OptionError:
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
    return Variant(inner(analysis.gm, analysis.inputs, analysis.config, False))


def _compile_sparse(
    analysis: Analysis, decisions: Decisions, inner: Inner, report: GraphReport
) -> Variant:
    started = time.perf_counter()
    rewritten = rewrite(analysis, decisions)
    report.seconds += time.perf_counter() - started
    report.rewritten = max(report.rewritten, len(rewritten.sites))
    inputs = [*analysis.inputs, *rewritten.values]
    compiled = inner(rewritten.gm, inputs, analysis.config, True)
    if analysis.config.check:
        twin = rewrite(analysis, decisions)  # the compiler owns the other, and may change it
        compiled = Checked(compiled, copy_graph(analysis.gm)[0], twin, report)
    return Variant(compiled, rewritten.derived)


def _refuse_obstacles(owners: Mapping[Names, Decisions]) -> None:
    """Raise for the sites that were planned sparse and cannot be."""
    obstacles = [
        f"{name}: {decision.reason}"
        for names, decisions in owners.items()
        for name, decision in zip(names, decisions, strict=True)
        if decision.obstacle
    ]
    if obstacles:
        raise RewriteError(
            f"strict=True, and {len(obstacles)} planned projections cannot be sparsified: "
            + "; ".join(obstacles[:5])
        )


def _key(decisions: Decisions) -> tuple[Settings | None, ...]:
    return tuple(decision.settings for decision in decisions)
