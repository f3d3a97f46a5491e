"""Plans that smooth every projection of a model, and graphs in which codes round nothing.

plan = smoothed(model, inputs)            a random smooth vector for each input that is quantised
run(graph, arguments)                     its products as they would be without quantisation
run(graph, arguments, wide=True)          the same in float64
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from amber_compile import AmberConfig, Plan
from amber_compile.analysis import Analysis
from amber_compile.derived import derive
from amber_compile.kernels.prepared_weight import unprepare
from amber_compile.plan import PlannedSite
from amber_compile.quantization import Quantization
from amber_compile.rewritten import Rewritten, rewrite_graph

QUANTIZE, LINEAR = torch.ops.amber.quantize_rows.default, torch.ops.amber.quantized_linear.default
CASTS = {"to", "float", "type_as"}


def analyse(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Analysis:
    """Return the analysis of the first graph of ``model``."""
    found: list[Analysis] = []

    def probe(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        found.append(Analysis.of(gm, example_inputs, AmberConfig(**options)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=probe)(**inputs)
    return found[0]


@torch.no_grad()
def smoothed(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Plan:
    """Return a plan under which projections are quantised, and smoothed by random vectors."""
    analysis = analyse(model, inputs, quantize="int8", **({"projections": ()} | options))
    (names,) = analysis.names
    generator = torch.Generator().manual_seed(0)
    sites, tensors, vectors = {}, dict[str, dict[str, Tensor]](), {}
    how = Quantization("int8", "smoothquant")
    decided = zip(names, analysis.projections, analysis.decisions(names), strict=True)
    for name, projection, decision in decided:
        choice = decision.settings or str(decision.reason)
        sites[name] = PlannedSite(projection.shape, choice, decision.unquantized or how)
        if decision.quantization:
            random = torch.randn(projection.channels, generator=generator).exp()
            tensors[name] = {"smooth": vectors.setdefault(projection.x, random)}
    return Plan(sites, {}, tensors)


def both(model: nn.Module, inputs: dict[str, Tensor], plan: Plan) -> Iterator[Rewritten]:
    """Yield the graph with its vectors in the quantise kernels, and the one with them folded."""
    analysis = analyse(model, inputs, plan=plan)
    for fold in (False, True):
        config = replace(analysis.config, fold_smooth=fold)
        changed = replace(analysis, config=config)
        with torch.no_grad():
            yield rewrite_graph(changed, changed.decisions(changed.names[0]))
    del analysis


@torch.no_grad()
def run(rewritten: Rewritten, given: Sequence[Any], *, wide: bool = False) -> Any:
    """Run a rewritten graph as if eight bits held every number."""
    derived = [derive(given[one.position], one.request) for one in rewritten.derived]
    arguments = [*given, *derived]
    if wide:
        arguments = [_wide(value) for value in arguments]
    return _Exact(rewritten.gm, wide).run(*arguments)


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


class _Exact(Interpreter):
    """Runs a graph without rounding to codes; in float64 throughout, if ``wide``."""

    def __init__(self, gm: GraphModule, wide: bool) -> None:
        super().__init__(gm)
        self._is_wide = wide

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self._is_wide and target in CASTS and _is_float(args[0]):
            return args[0]
        return self._kept(super().call_method(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is QUANTIZE:
            x, smooth, _ = args
            return x if smooth is None else x * smooth, None
        if target is LINEAR:
            x, _, weight, scale, bias, dtype = args
            codes = unprepare(weight, scale.shape[0], x.shape[-1]).to(x.dtype)
            y = x @ codes.T * scale
            y = y if bias is None else y + bias
            return y if self._is_wide else y.to(dtype)
        return self._kept(super().call_function(target, args, kwargs))

    def _kept(self, value: Any) -> Any:
        return _wide(value) if self._is_wide else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
