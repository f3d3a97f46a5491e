"""Analyse a graph once, then rewrite a copy of it for one set of decisions.

One graph may serve several owners: layers compiled one by one share it. Each owner's names can
mean other decisions, and each distinct tuple of decisions is a graph of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from .binding import Derived
from .config import AmberConfig
from .decision import Decision, blocked
from .derived import score_factor
from .errors import OptionError
from .graph import copy_graph, positions
from .kernels import nm_select  # noqa: F401
from .naming import owners, registered_shapes
from .passes.classify_phase import Phase, classify_phase, fixed_tokens, token_hints
from .passes.decide import Choose, decide
from .passes.find_projections import find_projections
from .passes.sparsify_projections import factor_key, sparsify_projections
from .passes.verify import verify
from .projection import Projection, fake, fake_mode_of
from .report import Site
from .rule import Rule, Shapes, find_preset, role_of
from .settings import Settings

Names = tuple[str, ...]
Decisions = tuple[Decision, ...]


@dataclass(frozen=True)
class Analysis:
    """What is known of a graph before anything is changed.

    Attributes:
        gm: the graph, never changed.
        inputs: its example inputs; real tensors where Dynamo has them.
        config: the options.
        projections: its projections in execution order.
        phase: prefill, decode or unknown.
        names: the projections' qualified names for each owner; that of ``inputs`` first.
    """

    gm: GraphModule
    inputs: Sequence[Any]
    config: AmberConfig
    projections: Sequence[Projection]
    phase: Phase
    names: Sequence[Names]

    @classmethod
    def of(cls, gm: GraphModule, inputs: Sequence[Any], config: AmberConfig) -> Analysis:
        """Analyse ``gm``."""
        projections = find_projections(gm)
        at = positions(gm)
        weights = [inputs[at[one.weight]] if one.weight in at else None for one in projections]
        phase = classify_phase(projections)
        return cls(gm, inputs, config, projections, phase, owners(projections, weights))

    @cached_property
    def positions(self) -> Sequence[int]:
        """Argument positions of the projections' weights."""
        at = positions(self.gm)
        return [at[one.weight] for one in self.projections if one.weight in at]

    @cached_property
    def needs_grad(self) -> bool:
        """Whether somebody may ask for gradients through the graph."""
        tensors = [value for value in self.inputs if isinstance(value, torch.Tensor)]
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @cached_property
    def min_tokens(self) -> int:
        """The token count below which a call stays dense: one token is always decode."""
        return max(self.config.min_tokens, 2 if self.phase == "unknown" else 1)

    def decisions(self, names: Names) -> Decisions:
        """Return what becomes of each projection when the owner's ``names`` are these.

        Raises:
            PlanError: if the plan belongs to another model.
        """
        choose = self._chooser(names)
        return tuple(
            self._decide(replace(projection, name=name), choose)
            for projection, name in zip(self.projections, names, strict=True)
        )

    def sites(self, names: Names, decisions: Decisions) -> list[Site]:
        """Return the report's rows for one owner, a projection that is called twice once."""
        rows = token_hints(self.projections)
        found: dict[str, Site] = {}
        for name, decision, projection, own in zip(
            names, decisions, self.projections, rows, strict=True
        ):
            site = Site(
                name=name,
                shape=projection.shape,
                macs=projection.macs * own / max(1, rows[0]),
                role=role_of(name),
                operator=projection.operator,
                decision=decision,
                share=_share(projection, decision),
                kernel="nm_select" if decision.sparse else "",
            )
            held = found.setdefault(name, site)
            held.macs += site.macs if held is not site else 0
        return list(found.values())

    def _decide(self, projection: Projection, choose: Choose) -> Decision:
        decision = decide(
            projection,
            self.phase,
            choose,
            tokens=fixed_tokens(self.projections),
            min_tokens=self.min_tokens,
            needs_grad=self.needs_grad,
        )
        if decision.settings is None or decision.settings.score == "magnitude":
            return decision
        weight = self.inputs[positions(self.gm)[projection.weight]]
        try:
            score_factor(weight, *factor_key(projection, decision.settings))
        except OptionError as cause:  # a weight that is not finite has no factor
            return blocked(str(cause))
        return decision

    def _chooser(self, names: Names) -> Choose:
        shapes = {name: one.shape for name, one in zip(names, self.projections, strict=True)}
        if self.config.plan is None:
            return Rule(self.config, find_preset(*self._model_shapes(shapes))).choose
        self.config.plan.check_model(shapes)
        return self._planned

    def _planned(self, projection: Projection) -> Settings | str:
        name = projection.name
        for pattern in self.config.skip:
            if fnmatchcase(name, pattern):
                return f"skip={pattern!r}"
        assert self.config.plan is not None
        choice = self.config.plan.sites[name].choice
        return f"plan: {choice}" if isinstance(choice, str) else choice

    def _model_shapes(self, shapes: Shapes) -> tuple[Shapes, list[tuple[int, ...]]]:
        """Return the projections and all parameter shapes of the model, as far as known."""
        registered = registered_shapes()
        if any(name in registered for name in shapes) and not set(registered) <= set(shapes):
            return {**registered, **shapes}, list(registered.values())
        weights = self.gm.graph.find_nodes(op="placeholder")
        values = [node.meta.get("example_value") for node in weights]
        return shapes, [tuple(v.shape) for v in values if isinstance(v, torch.nn.Parameter)]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a graph.

    Attributes:
        gm: the copy.
        derived: its further inputs, to be computed from the weights on each call.
        values: their fake values.
        sites: each rewritten projection, and the selection that its matmul now reads.
    """

    gm: GraphModule
    derived: tuple[Derived, ...]
    values: list[torch.Tensor]
    sites: list[tuple[Projection, Node]]


def rewrite(analysis: Analysis, decisions: Decisions) -> Rewritten:
    """Rewrite a copy of the graph by ``decisions``, one for each projection."""
    gm, nodes = copy_graph(analysis.gm)
    projections = [_moved(projection, nodes) for projection in analysis.projections]
    rows = token_hints(projections)
    done = sparsify_projections(
        gm,
        list(zip(projections, decisions, strict=True)),
        [analysis.min_tokens * max(1, own // max(1, rows[0])) for own in rows],
    )
    verify(gm, amber_only=True)
    at = positions(gm)
    derived = tuple(Derived(at[one.weight], one.key) for one in done.factors)
    values = [_input_like(fake(node)) for node in list(at)[len(analysis.inputs) :]]
    return Rewritten(gm, derived, values, done.sites)


def _share(projection: Projection, decision: Decision) -> float:
    """Return the part of a projection's outputs that reads a sparse activation."""
    if decision.settings is None:
        return 0.0
    rows = projection.gate_rows if decision.settings.part == "gate" else None
    return (rows or projection.shape[-2]) / projection.shape[-2]


def _moved(projection: Projection, nodes: dict[Node, Node]) -> Projection:
    return replace(
        projection,
        node=nodes.get(projection.node, projection.node),
        x=nodes.get(projection.x, projection.x),
        weight=nodes.get(projection.weight, projection.weight),
    )


def _input_like(value: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor of static shape, in the mode of the compilation to come if one is."""
    with detect_fake_mode(()) or fake_mode_of(value):
        return torch.empty(tuple(value.shape), dtype=value.dtype, device=value.device)
