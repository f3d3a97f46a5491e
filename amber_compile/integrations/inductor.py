"""A custom pass of Inductor: Amber inside ``torch.compile(model)`` without another backend.

    from amber_compile.integrations.inductor import AmberPass
    model = torch.compile(model, options={"post_grad_custom_pre_pass": AmberPass()})

    y = aten.mm(x, permute(w))    ->    s = nm_select(x, derive(w, "..."), 2, 4)
                                        y = aten.mm(s, permute(w))

The graph comes behind AOTAutograd: its inputs are anonymous (traced_inputs.py), and activations are
flattened. What follows from a weight is looked up while the graph runs (``amber::derive``), so
nothing of a weight is compiled in. Left alone: graphs for training, and everything that the backend
leaves alone.

Inductor keeps what a pass made in its caches, by the pass's ``uuid``. A graph that is found there
is loaded without running the pass, so it leaves no report.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from amber_compile.analysis import Analysis
from amber_compile.config import AmberConfig
from amber_compile.decision import Decision, blocked, unquantized
from amber_compile.environment import installed_version
from amber_compile.errors import OptionError, PlanError, RewriteError, choices
from amber_compile.graph import positions
from amber_compile.inductor import source_hash
from amber_compile.kernels.int8_kernel import int8_kernel
from amber_compile.naming import PARAMETER
from amber_compile.passes.derived_calls import SharedCalls
from amber_compile.passes.part_residuals import join_residuals, part_residuals
from amber_compile.plan import Plan
from amber_compile.programs.rewriting import checked, rewrite_analysed
from amber_compile.projection import value_of
from amber_compile.report import GraphReport, Report, record
from amber_compile.request_text import keep
from amber_compile.rewritten import rewrite_graph
from amber_compile.supported import check_torch
from amber_compile.trace import trace_graph, trace_report

from .shared_tensors import share_with_inductor
from .traced_inputs import mark_weights, traced_names

HOOKS = ("post_grad_custom_pre_pass", "post_grad_custom_post_pass")
SAVED, GRADIENTS = "primals_", "tangents_"
"""How AOTAutograd calls inputs of graphs for training: of the forward one, of the backward one."""


class AmberPass(CustomGraphPass):
    """Rewrites a graph behind AOTAutograd, in place. Passes of equal options are equal.

    Args:
        config: the options; those of :class:`AmberConfig` by default.

    Raises:
        OptionError: for an option that only the backend has (``check``, ``decode`` ...).
        VersionError: under a PyTorch that Amber does not know.
    """

    def __init__(self, config: AmberConfig | None = None) -> None:
        check_torch()
        self.config = checked(config)
        if isinstance(self.config.plan, Plan):
            keep(self.config.plan.tensors)

    def __call__(self, graph: Graph) -> None:
        """Rewrite ``graph``; one on which that fails stays as it is, with a warning.

        Raises:
            OptionError: if no graph module owns it.
            PlanError: if the plan belongs to another model.
            RewriteError: under ``strict=True``, if a planned projection cannot be rewritten.
        """
        gm = graph.owning_module
        if not isinstance(gm, GraphModule):
            raise OptionError("graph belongs to no module; valid: a graph that Inductor compiles")
        if _has_inputs(gm, GRADIENTS):
            return  # the graph that it is the backward of has told that it stays dense
        if inductor_config.freezing and graph.find_nodes(op="get_attr"):
            self._leave("freezing=True has made constants of its weights")
        trace_graph("before", gm)
        share_with_inductor()
        parted = part_residuals(graph)
        mark_weights(gm)
        report = self._rewrite(gm)
        join_residuals(graph, parted)
        if report.rewritten:
            trace_graph("after", gm)
        record(Report([report]))
        trace_report(report)

    def uuid(self) -> str:
        """Return a hash of what the rewritten graph depends on, beside the graph itself.

        That is Amber's version and sources, the options, what the devices can do, and the names of
        the modules: decisions follow them, and the key of Inductor's cache does not hold them.
        """
        version = installed_version("amber-compile")
        parts = version, source_hash(), _options(self.config), _devices(self.config)
        return hashlib.sha256(json.dumps([*parts, traced_names()]).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AmberPass) or type(self) is not type(other):
            return NotImplemented
        return self.config == other.config

    def __hash__(self) -> int:
        return hash((type(self), self.config))

    def _rewrite(self, gm: GraphModule) -> GraphReport:
        analysis = self._analysis(gm)
        try:
            decisions = analysis.decisions(analysis.names[0])
        except PlanError as cause:
            raise PlanError(
                f"{cause}. An AmberPass knows no registered model: give it the whole model, or use "
                "backend='amber'"
            ) from cause
        if any(decision.rewritten for decision in decisions):
            try:
                rewrite_graph(analysis, decisions, inputs=SharedCalls)
            except (OptionError, PlanError, RewriteError):
                raise
            except Exception as cause:  # on a copy: the graph itself is as it was
                return self._left_dense(analysis, decisions, cause)
        return rewrite_analysed(analysis, SharedCalls)[1]

    def _leave(self, reason: str) -> None:
        if self.config.strict:
            raise RewriteError(f"strict=True, and a graph stays dense: {reason}")
        warnings.warn(f"amber: a graph stays dense: {reason}", stacklevel=3)

    def _analysis(self, gm: GraphModule) -> Analysis:
        held = {node: value_of(node) for node in positions(gm) if PARAMETER in node.meta}
        kind = _Training if _has_inputs(gm, SAVED) else Analysis
        return kind.of(gm, (), self.config, held)

    def _left_dense(
        self, analysis: Analysis, decisions: Sequence[Decision], cause: Exception
    ) -> GraphReport:
        """Return the report of a graph that could not be rewritten, with a warning."""
        if self.config.strict:
            raise RewriteError(f"the graph cannot be rewritten: {cause}") from cause
        failure = f"{type(cause).__name__}: {cause}"
        reason = f"the graph cannot be rewritten ({failure})"
        warnings.warn(f"amber: a graph stays dense: {reason}", stacklevel=4)
        report = GraphReport(analysis.phase, fallback=failure)
        kept = tuple(_dense(decision, reason) for decision in decisions)
        report.sites = analysis.sites(analysis.names[0], kept)
        return report


class _Training(Analysis):
    """Of a graph that a backward pass belongs to."""

    @cached_property
    def needs_grad(self) -> bool:
        return True


def inductor_options(
    config: AmberConfig | None = None, *, hook: str = HOOKS[0]
) -> dict[str, CustomGraphPass]:
    """Return ``options=`` of ``torch.compile`` with Amber behind the pass that is configured.

    Args:
        config: the options of the pass.
        hook: which of Inductor's hooks; another pass that ``torch._inductor.config`` has there
            runs first.

    Raises:
        OptionError: for another hook, or if there is an :class:`AmberPass` already.
    """
    if hook not in HOOKS:
        raise OptionError(choices("hook", hook, HOOKS))
    before = getattr(inductor_config, hook)
    passes = before if isinstance(before, list | tuple) else [before] if before else []
    return {hook: chain(*passes, AmberPass(config))}


def chain(*passes: Callable[[Graph], None]) -> CustomGraphPass:
    """Return one pass that runs ``passes`` in turn: PyTorch 2.11 and 2.12 take one for a hook.

    Raises:
        OptionError: without a pass, with what is none, or with two of Amber's.
    """
    if not passes or not all(map(callable, passes)):
        raise OptionError(f"passes={passes!r}; valid: one callable or more, each taking a graph")
    if any(isinstance(one, _inference_aware()) for one in passes):
        raise OptionError(
            "a CustomInferenceAwareGraphPass takes more than a graph; valid: a list in place of a "
            "chain, such as options={hook: [that pass, AmberPass()]}"
        )
    own = [one for one in _flat(passes) if isinstance(one, AmberPass)]
    if len(own) > 1:
        raise OptionError(
            f"{len(own)} AmberPass for one hook; valid: one, for the second finds every graph "
            "rewritten already. Join their options in one AmberConfig or plan"
        )
    return passes[0] if len(passes) == 1 and own else _Chain(*passes)  # type: ignore[return-value]


class _Chain(CustomGraphPass):
    """Passes in turn; it may be cached if each of them may."""

    def __init__(self, *passes: Callable[[Graph], None]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        found = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if None in found else tuple(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chain) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)


def _flat(passes: Sequence[Any]) -> Iterator[Any]:
    for one in passes:
        yield from _flat(one.passes) if isinstance(one, _Chain) else (one,)


def _inference_aware() -> tuple[type, ...]:
    """Return the kind of pass that is told whether a graph is for inference: not in 2.11."""
    kind = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    return (kind,) if kind else ()


def _has_inputs(gm: GraphModule, name: str) -> bool:
    return any(str(node.target).startswith(name) for node in positions(gm))


def _dense(decision: Decision, reason: str) -> Decision:
    if decision.sparse:
        return blocked(reason)
    return unquantized(decision, reason) if decision.quantization else decision


# ---- what a rewritten graph depends on -----------------------------------------------------------


def _options(config: AmberConfig) -> dict[str, Any]:
    """Return the options as plain values, a plan by its content."""
    plain = {name: value for name, value in vars(config).items() if name != "plan"}
    plan = config.plan
    held = [plan.to_json(), plan.tensors.id] if isinstance(plan, Plan) else None
    return {**{name: str(value) for name, value in plain.items()}, "plan": held}


def _devices(config: AmberConfig) -> list[Any]:
    """Return what decides among kernels, and how a quantised weight is laid out."""
    gpus = range(torch.cuda.device_count())
    found: list[Any] = [torch.cuda.get_device_capability(at) for at in gpus]
    planned = isinstance(config.plan, Plan) and any(
        not isinstance(site.quantization, str | None) for site in config.plan.sites.values()
    )
    return [*found, int8_kernel()] if config.quantize or planned else found
