"""The ``torch.compile`` backend: ``torch.compile(model, backend="amber", options={...})``.

    Dynamo graph ── find, classify, decide ──►  decisions ── sparsify, verify ──►  rewritten copy
                                                │                                      │ compile
                                                ▼                                      ▼
                                              Report                     Binding(compiled, derived)

A graph in which nothing is sparsified goes to Inductor untouched: decode is the dense backend's
own. Dynamo enters a backend twice for some graphs and reads its graph afterwards, so nothing here
changes what it was given.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from .analysis import Analysis
from .binding import Compiled
from .breaks import break_after
from .config import AmberConfig
from .inductor import compile_with_inductor, inductor_patches
from .report import GraphReport, Report, record
from .supported import check_torch
from .trace import trace_graph, trace_report
from .variants import Inner, compile_variants


def amber(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Rewrite a Dynamo graph and compile it with Inductor: the entry point ``"amber"``.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its inputs, parameters among them.
        mode: ``mode=`` of ``torch.compile``: an Inductor mode.
        options: ``options=`` of ``torch.compile``: the fields of :class:`AmberConfig`.

    Raises:
        OptionError: for an unknown option or value.
        PlanError: if a plan belongs to another model.
        RewriteError: under ``strict=True``, if a planned projection cannot be sparsified.
        VersionError: under a PyTorch that Amber does not know.
    """
    config = AmberConfig.from_options(mode, options)
    inductor_patches(config)  # an unknown entry is an error, whether or not anything is rewritten
    return compile_graph(gm, example_inputs, config, compile_with_inductor)


def amber_eager(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Rewrite a Dynamo graph and run it without generating code: ``"amber_eager"``.

    For looking and for debugging, as PyTorch's ``"eager"`` is; arguments and errors of ``amber``.
    """
    config = AmberConfig.from_options(mode, options)
    return compile_graph(gm, example_inputs, config, _run_eagerly)


def compile_graph(
    gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, inner: Inner
) -> Compiled:
    """Rewrite ``gm`` as ``config`` says, compile it with ``inner`` and record a report."""
    check_torch()
    started = time.perf_counter()
    analysis = Analysis.of(gm, inputs, config)
    graph = GraphReport(analysis.phase, broken=break_after(gm))
    graph.seconds = time.perf_counter() - started
    trace_graph("before", gm)

    def traced(
        gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
    ) -> Compiled:
        if rewritten:
            trace_graph("after", gm)
        return inner(gm, inputs, config, rewritten)

    compiled = compile_variants(analysis, traced, graph, release=True)
    record(Report([graph]))
    trace_report(graph)
    return compiled


def _run_eagerly(
    gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
) -> Compiled:
    forward: Compiled = gm.forward
    return forward
