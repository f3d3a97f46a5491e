"""Rewrite a program, and return one of the same kind, called in the same way.

| program | its weights | what is derived from them |
|---|---|---|
| `torch.export.ExportedProgram` | its state | further buffers of it, made now |
| a graph that Dynamo hands to a backend | its inputs | ``amber::derive``, looked up in each call |
| a module of ``symbolic_trace`` or ``make_fx`` | its attributes | the same |

The program that was given is left as it is. The rewritten one is for inference: a gradient through
it is an error. It is analysed and rewritten as the backend does a graph; one that is rewritten
already comes back with nothing further changed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from amber_compile.analysis import Analysis
from amber_compile.config import AmberConfig
from amber_compile.errors import OptionError
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.report import GraphReport, Report, Site, record
from amber_compile.rewritten import Rewritten, rewrite_graph
from amber_compile.stages import Stages
from amber_compile.supported import check_torch
from amber_compile.trace import trace_report
from amber_compile.variants import tell_obstacles

OF_THE_BACKEND = ("check", "decode", "mode", "inductor")
"""Options about what the backend does after rewriting."""

Program = TypeVar("Program", GraphModule, torch.export.ExportedProgram)


def rewrite(
    program: Program,
    config: AmberConfig | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
) -> tuple[Program, Report]:
    """Return ``program`` rewritten as ``config`` says, and what was done and why not the rest.

    Args:
        program: a ``torch.export.ExportedProgram`` or a ``torch.fx.GraphModule``; never changed.
        config: the options; those of :class:`AmberConfig` by default.
        example_inputs: what the program is called with: the inputs of a Dynamo graph as a backend
            gets them; for a module of ``symbolic_trace``, which records no shapes, any that fit.

    Raises:
        OptionError: for a program of another kind, an option that only the backend has, or a module
            without recorded shapes and without ``example_inputs``.
        PlanError: if a plan belongs to another model.
        RewriteError: under ``strict=True``, if a planned projection cannot be rewritten.
    """
    from .exported import rewrite_exported
    from .graph_module import rewrite_module

    config = checked(config)
    rewritten: Any  # of the kind that was given
    report: Report
    if isinstance(program, torch.export.ExportedProgram):
        rewritten, report = rewrite_exported(program, config)
    elif isinstance(program, GraphModule):
        rewritten, report = rewrite_module(program, config, example_inputs)
    else:
        raise OptionError(
            f"program is a {type(program).__name__}; valid: torch.fx.GraphModule, "
            "torch.export.ExportedProgram (an nn.Module: torch.compile(model, backend='amber'))"
        )
    record(report)
    trace_report(report.graphs[0])
    return rewritten, report


def checked(config: AmberConfig | None) -> AmberConfig:
    """Return ``config``, or the default, without options that only the backend has.

    Raises:
        OptionError: if it is something else, or has such an option.
        VersionError: under a PyTorch that Amber does not know.
    """
    check_torch()
    config = AmberConfig() if config is None else config
    if not isinstance(config, AmberConfig):
        raise OptionError(f"config={config!r}; valid: an AmberConfig, or None for the defaults")
    defaults = {option.name: option.default for option in fields(config)}
    for name in OF_THE_BACKEND:
        value = getattr(config, name)
        if value and value != defaults[name]:
            raise OptionError(
                f"{name}={value!r} is for backend='amber' only, which compiles what it rewrites"
            )
    return config


def rewrite_analysed(
    analysis: Analysis, inputs: type[DerivedInputs]
) -> tuple[Rewritten | None, GraphReport]:
    """Rewrite the analysed graph itself; None if nothing is to be rewritten."""
    started = time.perf_counter()
    names = analysis.names[0]
    decisions = analysis.decisions(names)
    tell_obstacles(analysis, {names: decisions})
    report = GraphReport(analysis.phase)
    report.sites = analysis.sites(names, decisions)  # before a pass erases what they were
    stages = Stages(analysis, names, report)
    done = None
    if any(decision.rewritten for decision in decisions):
        done = rewrite_graph(analysis, decisions, stages, inputs=inputs, in_place=True)
        report.rewritten = done.changed
        report.sites = _smoothed(report.sites, analysis, done)
    report.plan = analysis.config.plan  # type: ignore[assignment]  # a Plan, once it is parsed
    report.seconds = time.perf_counter() - started
    return done, report


def _smoothed(sites: Sequence[Site], analysis: Analysis, done: Rewritten) -> list[Site]:
    """Return ``sites`` with where their smooth vectors are applied."""
    named = zip(analysis.names[0], analysis.projections, strict=True)
    places = {name: done.smoothing.get(one.name, "") for name, one in named}
    return [replace(site, smoothing=places[site.name]) for site in sites]
