"""A custom pass of Inductor: Amber inside ``torch.compile(model)`` without another backend.

    from amber_compile.integrations.inductor import AmberPass
    model = torch.compile(model, options={"post_grad_custom_pre_pass": AmberPass()})

    y = aten.mm(x, permute(w))    ->    s = nm_select(x, derive(w, "..."), 2, 4)
                                        y = aten.mm(s, permute(w))

The graph comes behind AOTAutograd: weights are inputs without a name or a value, activations are
flattened. A projection is named by the module that its call lies in; what follows from a weight is
looked up while the graph runs (``amber::derive``), so nothing of a weight is compiled in. Left
alone: graphs for training, and everything that the backend leaves alone.

Inductor keeps what a pass made in its caches, by the pass's ``uuid``. A graph that is found there
is loaded without running the pass, so it leaves no report.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._guards import TracingContext
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from amber_compile.analysis import Analysis
from amber_compile.config import AmberConfig
from amber_compile.environment import installed_version
from amber_compile.errors import OptionError, PlanError, RewriteError, choices
from amber_compile.graph import copy_graph, positions
from amber_compile.inductor import source_hash
from amber_compile.kernels.int8_kernel import int8_kernel
from amber_compile.naming import PARAMETER
from amber_compile.passes.derived_calls import DerivedCalls
from amber_compile.passes.find_projections import SPELLINGS
from amber_compile.passes.weight_operand import QUANTISED, TRANSPOSES, operation
from amber_compile.plan import Plan
from amber_compile.programs.rewriting import checked, rewrite_analysed
from amber_compile.projection import value_of
from amber_compile.report import Report, record
from amber_compile.request_text import keep
from amber_compile.trace import trace_report

HOOKS = ("post_grad_custom_pre_pass", "post_grad_custom_post_pass")
OF_TRAINING = ("primals_", "tangents_")
"""How AOTAutograd calls the inputs of graphs that a backward pass belongs to."""


class AmberPass(CustomGraphPass):
    """Rewrites a graph behind AOTAutograd, in place.

    Args:
        config: the options; those of :class:`AmberConfig` by default.

    Raises:
        OptionError: for an option that only the backend has (``check``, ``decode`` ...).
    """

    def __init__(self, config: AmberConfig | None = None) -> None:
        self.config = checked(config)
        if isinstance(self.config.plan, Plan):
            keep(self.config.plan.tensors)

    def __call__(self, graph: Graph) -> None:
        """Rewrite ``graph``; one on which that fails stays as it is, with a warning.

        Raises:
            PlanError: if the plan belongs to another model.
            RewriteError: under ``strict=True``, if a planned projection cannot be rewritten.
        """
        gm = graph.owning_module
        if not isinstance(gm, GraphModule):
            raise OptionError("graph belongs to no module; valid: a graph that Inductor compiles")
        if any(str(node.target).startswith(OF_TRAINING) for node in positions(gm)):
            self._leave("it is for training: call the model under torch.no_grad()")
            return
        _mark_weights(gm)
        try:
            self._rewrite(copy_graph(gm)[0])  # what fails does so on a copy
        except (OptionError, PlanError, RewriteError):
            raise
        except Exception as cause:
            self._leave(f"it cannot be rewritten ({type(cause).__name__}: {cause})")
            return
        report = self._rewrite(gm)
        record(report)
        trace_report(report.graphs[0])

    def uuid(self) -> str:
        """Return a hash of what the rewritten graph depends on, beside the graph itself.

        That is Amber's version and sources, the options, what the devices can do, and the names of
        the modules: decisions follow them, and the key of Inductor's cache does not hold them.
        """
        version = installed_version("amber-compile")
        parts = version, source_hash(), _options(self.config), _devices(self.config)
        return hashlib.sha256(json.dumps([*parts, _module_names()]).encode()).hexdigest()

    def _rewrite(self, gm: GraphModule) -> Report:
        held = {node: value_of(node) for node in positions(gm) if PARAMETER in node.meta}
        analysis = Analysis.of(gm, (), self.config, held)
        _, graph = rewrite_analysed(analysis, DerivedCalls, in_place=True)
        return Report([graph])

    def _leave(self, reason: str) -> None:
        if self.config.strict:
            raise RewriteError(f"strict=True, and a graph stays dense: {reason}")
        warnings.warn(f"amber: a graph stays dense: {reason}", stacklevel=3)


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
    own = [one for one in _flat(passes) if isinstance(one, AmberPass)]
    if len(own) > 1:
        raise OptionError(
            f"{len(own)} AmberPass for one hook; valid: one, for the second finds every graph "
            "rewritten already. Join their options in one AmberConfig or plan"
        )
    if not passes or not all(map(callable, passes)):
        raise OptionError(f"passes={passes!r}; valid: one callable or more, each taking a graph")
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


def _flat(passes: tuple[Any, ...]) -> Iterator[Any]:
    for one in passes:
        yield from _flat(one.passes) if isinstance(one, _Chain) else (one,)


# ---- weights -------------------------------------------------------------------------------------


def _mark_weights(gm: GraphModule) -> None:
    """Mark the inputs of ``gm`` that are weights: they keep their storage from call to call.

    AOTAutograd knows which do. Where nobody asked it, an input of fixed size counts that nothing
    but products read, on the side of their weight.
    """
    static = _static_inputs()
    for at, node in enumerate(positions(gm)):
        value = value_of(node)
        if isinstance(value, torch.Tensor) and _may_be_weight(value):
            is_weight = at in static if static is not None else _only_multiplies(node)
            if is_weight:
                node.meta[PARAMETER] = ""


def _static_inputs() -> set[int] | None:
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    return set(metadata.static_input_indices) if metadata else None


def _may_be_weight(value: torch.Tensor) -> bool:
    if not all(isinstance(size, int) for size in value.shape):
        return False
    return value.is_floating_point() or (value.dtype in QUANTISED and value.dim() >= 2)


def _only_multiplies(node: Node) -> bool:
    users = [
        (user, read)
        for read in (node, *(one for one in node.users if operation(one) in TRANSPOSES))
        for user in read.users
        if operation(user) not in TRANSPOSES
    ]
    right = [
        user.target in SPELLINGS and user.args[SPELLINGS[user.target].weight] is read
        for user, read in users
    ]
    return bool(right) and all(right)


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


def _module_names() -> list[str]:
    """Return how Dynamo reaches the modules of what is being compiled."""
    context = TracingContext.try_get()
    guards = context.guards_context.dynamo_guards if context else ()
    return sorted({guard.name for guard in guards if guard.name.endswith("']")})
