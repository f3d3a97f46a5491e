"""Analyse a graph: its projections, their names, its phase, and what becomes of each.

One graph may serve several owners: layers compiled one by one share it. Each owner's names can
mean other decisions, and each distinct tuple of decisions is a graph of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .config import AmberConfig
from .decision import Decision, blocked, unquantized
from .derivations import Derivation, Matrix
from .derived import derive
from .errors import OptionError, PlanError
from .graph import positions
from .kernel_names import kernel_of
from .kernels.codes import CODES
from .kernels.prepared_weight import prepared_shape
from .naming import PARAMETER, owners, registered_shapes
from .passes.classify_phase import Phase, classify_phase, fixed_tokens, token_hints
from .passes.decide import decide
from .passes.decide_quantization import decide_quantization
from .passes.find_projections import find_projections
from .passes.sharded_operands import gate_rows_of_whole
from .passes.sparsify_projections import factor_of
from .permute import why_not_permuted
from .plan import Plan
from .plan_tensors import PlanTensors
from .projection import Projection, fake, value_of
from .report import Site
from .rule import Planned, Rule, Shapes, find_preset, role_of
from .settings import CALIBRATED

Names = tuple[str, ...]
Decisions = tuple[Decision, ...]


@dataclass(frozen=True)
class Analysis:
    """What is known of a graph before anything is changed.

    Attributes:
        gm: the graph, never changed.
        inputs: its example inputs; real tensors where Dynamo has them.
        config: the options.
        held: the weight behind each node that something may be derived from: real, or fake.
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
    held: Mapping[Node, Any]

    @classmethod
    def of(
        cls,
        gm: GraphModule,
        inputs: Sequence[Any],
        config: AmberConfig,
        held: Mapping[Node, Any] | None = None,
        phase: Phase | None = None,
    ) -> Analysis:
        """Analyse ``gm``; ``held`` and ``phase`` where its inputs and its graph do not tell."""
        projections = find_projections(gm)
        if held is None:
            held = dict(zip(positions(gm), inputs, strict=False))
        named = owners(projections, [held.get(one.weight) for one in projections])
        phase = phase or classify_phase(projections)
        return cls(gm, inputs, config, projections, phase, named, held)

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
        chooser = self._chooser(names)
        named = [
            replace(projection, name=name)
            for projection, name in zip(self.projections, names, strict=True)
        ]
        own = names == self.names[0]  # the weights at hand; others are seen when they are bound
        return tuple(self._decide(projection, chooser, own) for projection in named)

    def factors(self, names: Names) -> list[Derivation | None]:
        """Return for each projection the score factor that some graph of the plan may ask for."""
        chooser, found = self._chooser(names), list[Derivation | None]()
        for name, projection in zip(names, self.projections, strict=True):
            choice = chooser.choose(replace(projection, name=name))
            if isinstance(choice, str) or choice.score == CALIBRATED:
                found.append(None)  # dense, or a tensor of the plan
            else:
                found.append(factor_of(projection, choice, self.tensors))
        return found

    def sites(
        self, names: Names, decisions: Decisions, smoothing: Mapping[str, str] | None = None
    ) -> list[Site]:
        """Return the report's rows for one owner, a projection that is called twice once.

        ``smoothing`` tells where smooth vectors are applied, by the names in the graph.
        """
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
                kernel=kernel_of(projection, decision),
                weight_bytes=fake(projection.weight).nbytes,
                code_bytes=_code_bytes(projection, decision),
                smoothing=(smoothing or {}).get(projection.name, ""),
            )
            found[name] = found[name].called_again(site) if name in found else site
        return list(found.values())

    def _decide(self, projection: Projection, chooser: Rule | Planned, own: bool) -> Decision:
        decision = decide(
            projection,
            self.phase,
            chooser.choose,
            tokens=fixed_tokens(self.projections),
            min_tokens=self.min_tokens,
            needs_grad=self.needs_grad,
        )
        obstacle = self._why_not_derived(projection, decision, own)
        decision = decide_quantization(
            projection,
            blocked(obstacle) if obstacle else decision,
            self.phase,
            chooser.quantization,
            decode=self.config.decode is not None,
            needs_grad=self.needs_grad,
        )
        obstacle = self._why_not_coded(projection, decision)
        return unquantized(decision, obstacle) if obstacle else decision

    def _why_not_coded(self, projection: Projection, decision: Decision) -> str | None:
        """Return why a site cannot have what its quantisation needs, or None."""
        if decision.quantization is None:
            return None
        if projection.weight not in self.held:
            return "its weight is a constant of the graph or written to by it: no codes follow"
        tensors = self.tensors or PlanTensors()
        if decision.quantization.smooth and "smooth" not in tensors.names(projection.name):
            return "the plan holds no tensor smooth for it"
        return None

    def _why_not_derived(self, projection: Projection, decision: Decision, own: bool) -> str | None:
        """Return why a sparse site cannot have what follows from its weight, or None."""
        if decision.settings is None:
            return None
        settings, tensors = decision.settings, self.tensors or PlanTensors()
        held = tensors.names(projection.name)
        missing = [name for name in settings.tensors if name not in held]
        if missing:
            return f"the plan holds no tensor {', '.join(missing)} for it"
        factor = factor_of(projection, settings, tensors)
        if factor is None and not settings.tensors:
            return None
        if projection.weight not in self.held:
            return "its weight is a constant of the graph or written to by it: no factor follows"
        weight = self.held[projection.weight]
        if own and settings.permuted:
            matrix = Matrix(projection.transposed).of(weight)
            return why_not_permuted(matrix, tensors, projection.name)
        try:
            if own and factor is not None:
                derive(weight, factor)
        except (OptionError, PlanError) as cause:  # a weight that is not finite has no factor
            return str(cause)
        return None

    @property
    def tensors(self) -> PlanTensors | None:
        """What the plan holds beside its decisions."""
        return self.config.plan.tensors if isinstance(self.config.plan, Plan) else None

    def same_tensor(self, name: str, one: str, other: str) -> bool:
        """Whether the plan has equal tensors for two projections, whoever owns the graph.

        ``one`` and ``other`` are their names in the graph.
        """
        at = {projection.name: place for place, projection in enumerate(self.projections)}
        tensors = self.tensors or PlanTensors()
        for names in self.names:
            left, right = (tensors.get(names[at[site]], name) for site in (one, other))
            if left is None or right is None or not torch.equal(left, right):
                return False
        return True

    def _chooser(self, names: Names) -> Rule | Planned:
        shapes = {name: one.shape for name, one in zip(names, self.projections, strict=True)}
        plan = self.config.plan
        if isinstance(plan, Plan):
            plan.check_model(shapes)
            return Planned(plan, self.config.skip, self.config.quantize_skip)
        return Rule(self.config, find_preset(*self._model_shapes(shapes)))

    def _model_shapes(self, shapes: Shapes) -> tuple[Shapes, list[tuple[int, ...]]]:
        """Return the projections and all parameter shapes of the model, as far as known."""
        known: Shapes = {}
        for projection in self.projections:
            known = known or registered_shapes(self.held.get(projection.weight))
        if known:
            return {**known, **shapes}, list(known.values())
        nodes = [node for node in self.gm.graph.nodes if node.op in ("placeholder", "get_attr")]
        return shapes, [tuple(fake(node).shape) for node in nodes if _is_parameter(node)]


def _is_parameter(node: Node) -> bool:
    return isinstance(value_of(node), torch.nn.Parameter) or PARAMETER in node.meta


def _code_bytes(projection: Projection, decision: Decision) -> int:
    """Return the size of a projection's quantised weight, scales included."""
    if decision.quantization is None:
        return 0
    rows, channels = projection.shape
    dtype = CODES[decision.quantization.dtype]
    prepared = prepared_shape(rows, channels, dtype, fake(projection.weight).device)
    return math.prod(prepared) + 4 * rows


def _share(projection: Projection, decision: Decision) -> float:
    """Return the part of a projection's outputs that reads a sparse activation."""
    if decision.settings is None:
        return 0.0
    rows = gate_rows_of_whole(projection) if decision.settings.part == "gate" else None
    return (rows or projection.shape[-2]) / projection.shape[-2]
