"""Run a model dense and sparse side by side, and measure what sparsity changes.

    report = check(model, input_ids, pattern="2:4")
    report.worst(5)             the sites with the largest error
    report.output               error of the whole model's output: relative l2, KL, top-1 agreement

At each site the dense product is computed from the input that the selection reads (checked.py); the
outputs of each graph, and of the whole model, are compared with the dense ones. No code is
generated: the rewritten graphs run as they are. Neither the model, nor the inputs (caches among
them), nor what the process has compiled, nor ``last_reports()`` change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from amber_compile.analysis import Analysis
from amber_compile.binding import Compiled
from amber_compile.breaks import break_after
from amber_compile.config import AmberConfig
from amber_compile.explain import config_for
from amber_compile.naming import registered
from amber_compile.outside import linears_outside
from amber_compile.report import GraphReport, Report
from amber_compile.variants import Inner, compile_variants

from .output_error import output_error
from .replay import Call


def check(
    model: nn.Module, *args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Report:
    """Return the report of ``model`` with the error of every site, graph, and its output.

    Args:
        model: with its weights.
        args: positional inputs of the model.
        kwargs: keyword inputs of the model; apart, so that none is taken for an option.
        options: the fields of :class:`AmberConfig`; ``decode`` changes nothing here, for no weight
            is released.

    Raises:
        TypeError: if ``model`` is no module.
        OptionError: for an unknown option or value, or a model on the meta device.
        ReleasedError: if the values of its weights were released.
        RewriteError: under ``strict=True``, if a planned projection cannot be sparsified.
    """
    call = Call(model, args, kwargs)
    config = replace(config_for(call.model, options), decode=None, check=True)
    rewriter = Rewriter(config, uncompiled)
    with registered(call.model):
        expected = call.dense()
        actual = call.through(rewriter.graph)
    report = Report(rewriter.graphs, unended=call.breaks)
    report.outside = linears_outside(call.model, report, rewriter.read, None)
    report.explained = "dense and sparse ran side by side, without generated code"
    report.output = output_error(expected, actual)
    return report


class Rewriter:
    """A backend that rewrites graphs by ``config`` and hands them to ``inner``; records nothing.

    Without ``fuse`` selections stay nodes of their own (rewritten.py).

    Attributes:
        graphs: a report of each graph.
        read: identities of the tensors that some graph reads.
        shapes: of every projection, those of owners that were not called included.
    """

    def __init__(self, config: AmberConfig, inner: Inner, *, fuse: bool = True) -> None:
        self._config = config
        self._fuse = fuse
        self._inner = inner
        self.graphs: list[GraphReport] = []
        self.read: set[int] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}

    def graph(self, gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Rewrite and compile one graph."""
        analysis = Analysis.of(gm, inputs, self._config)
        report = GraphReport(analysis.phase, broken=break_after(gm))
        self.read.update(map(id, inputs))
        shapes = [one.shape for one in analysis.projections]
        for names in analysis.names:
            self.shapes.update(zip(names, shapes, strict=True))
        compiled = compile_variants(analysis, self._inner, report, fuse=self._fuse)
        self.graphs.append(report)
        return compiled


def uncompiled(
    gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
) -> Compiled:
    """Compile nothing: run the graph as it is."""
    forward: Compiled = gm.forward
    return forward
