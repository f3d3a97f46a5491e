"""Trace a model with Dynamo, and analyse and rewrite its graphs without compiling them.

    a call  ── Dynamo ──►  graph  ── on_device, Analysis, rewrite ──►  GraphReport

A graph that ends with the call is not run: nothing can follow. Any other one runs as it was traced,
since the Python behind a graph break goes on with its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx import GraphModule

from .analysis import Analysis
from .binding import Compiled
from .breaks import Break, break_after
from .config import AmberConfig
from .fake_model import OnAnyBuild, on_device
from .report import GraphReport
from .undisturbed import isolated, undisturbed, with_own_code
from .variants import compile_variants


class _Done(Exception):
    """Raised in place of running a graph behind which nothing is left to trace."""


class Tracer:
    """Traces a model; as its backend, analyses and rewrites each graph.

    Attributes:
        graphs: a report of each graph.
        breaks: every graph break.
        read: identities of the tensors that some graph reads.
    """

    def __init__(self, config: AmberConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.graphs: list[GraphReport] = []
        self.breaks: list[Break] = []
        self.read: set[int] = set()

    def trace(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: bool
    ) -> str | None:
        """Trace a call of ``model``; return why it stopped half-way, if it did."""

        def call() -> Any:
            return model(*args, **kwargs)

        with undisturbed(self.graph, self.breaks) as backend:
            settings = {"backend": backend, "dynamic": dynamic, **isolated()}
            try:
                torch.compile(with_own_code(call), **settings)()
            except _Done:
                return None
            except (DataDependentOutputException, DynamicOutputShapeException) as cause:
                return f"{cause.func} needs the values of a tensor"
            except BackendCompilerFailed as failure:  # Dynamo's wrapping of what we raised
                raise failure.inner_exception from None
        return None

    def graph(self, gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Explain one graph and return what stands for its compiled form."""
        moved = on_device(gm, self._device)
        analysis = Analysis.of(moved, inputs, self._config)
        report = GraphReport(analysis.phase, broken=break_after(gm))
        self.read.update(map(id, inputs))
        own = len(inputs)
        forward: Compiled = gm.forward

        def run(*arguments: Any) -> Any:
            return forward(*arguments[:own])  # what was derived for the rewritten graph is dropped

        with OnAnyBuild():
            bound = compile_variants(analysis, lambda *_: run, report)
        self.graphs.append(report)
        return _stop if _is_whole(gm) else bound


def _stop(*_: Any) -> Any:
    raise _Done


def _is_whole(gm: GraphModule) -> bool:
    """Whether the graph ends with the call that is explained: nothing can follow."""
    cause: Any = gm.compile_subgraph_reason
    if cause is None or cause.graph_break:
        return False
    return [frame.filename for frame in cause.user_stack] == [__file__]
