"""Analyse a graph: its projections, their names, its phase, and what becomes of each.

One graph may serve several owners: layers compiled one by one share it. Each owner's names can
mean other decisions, and each distinct tuple of decisions is a graph of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .config import AmberConfig
from .decision import Decision, blocked
from .derived import score_factor
from .errors import OptionError
from .graph import positions
from .kernels.nm_linear import kernel_of
from .kernels.nm_select import kernel_for
from .naming import owners, registered_shapes
from .passes.classify_phase import Phase, classify_phase, fixed_tokens, token_hints
from .passes.decide import Choose, decide
from .passes.find_projections import find_projections
from .passes.fuse_projections import why_separate
from .passes.sparsify_projections import factor_key
from .plan import Plan
from .projection import Projection, fake, value_of
from .report import Site
from .rule import Planned, Rule, Shapes, find_preset, role_of

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
    def _at(self) -> dict[Node, int]:
        return positions(self.gm)

    @cached_property
    def positions(self) -> Sequence[int]:
        """Argument positions of the projections' weights."""
        return [self._at[one.weight] for one in self.projections if one.weight in self._at]

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
        named = [
            replace(projection, name=name)
            for projection, name in zip(self.projections, names, strict=True)
        ]
        own = names == self.names[0]  # the weights at hand; others are seen when they are bound
        return tuple(self._decide(projection, choose, own) for projection in named)

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
                kernel=_kernel(projection, decision),
            )
            found[name] = found[name].called_again(site) if name in found else site
        return list(found.values())

    def _decide(self, projection: Projection, choose: Choose, own: bool) -> Decision:
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
        if projection.weight not in self._at:
            return blocked("its weight is a constant of the graph, and a factor follows an input")
        weight = self.inputs[self._at[projection.weight]]
        try:
            if own:
                score_factor(weight, *factor_key(projection, decision.settings))
        except OptionError as cause:  # a weight that is not finite has no factor
            return blocked(str(cause))
        return decision

    def _chooser(self, names: Names) -> Choose:
        shapes = {name: one.shape for name, one in zip(names, self.projections, strict=True)}
        plan = self.config.plan
        if isinstance(plan, Plan):
            plan.check_model(shapes)
            return Planned(plan, self.config.skip).choose
        return Rule(self.config, find_preset(*self._model_shapes(shapes))).choose

    def _model_shapes(self, shapes: Shapes) -> tuple[Shapes, list[tuple[int, ...]]]:
        """Return the projections and all parameter shapes of the model, as far as known."""
        known: Shapes = {}
        for at in self.positions:
            known = known or registered_shapes(self.inputs[at])
        if known:
            return {**known, **shapes}, list(known.values())
        values = map(value_of, self.gm.graph.find_nodes(op="placeholder"))
        return shapes, [tuple(v.shape) for v in values if isinstance(v, torch.nn.Parameter)]


def _kernel(projection: Projection, decision: Decision) -> str:
    """Name what runs a sparse projection; on a GPU, why no sparse unit multiplies, if so."""
    if decision.settings is None:
        return ""
    x, settings = fake(projection.x), decision.settings
    reason = why_separate(projection, settings)
    if reason is None:
        return kernel_of(x, fake(projection.weight))
    selected = f"nm_select, {kernel_for(x)}"
    return f"{selected}; {reason}" if x.device.type == "cuda" else selected


def _share(projection: Projection, decision: Decision) -> float:
    """Return the part of a projection's outputs that reads a sparse activation."""
    if decision.settings is None:
        return 0.0
    rows = projection.gate_rows if decision.settings.part == "gate" else None
    return (rows or projection.shape[-2]) / projection.shape[-2]
