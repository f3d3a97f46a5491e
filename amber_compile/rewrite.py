"""Rewrite a copy of an analysed graph for one set of decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from .analysis import Analysis, Decisions
from .binding import Derived
from .graph import copy_graph, positions
from .passes.classify_phase import token_hints
from .passes.fuse_projections import fuse_projections
from .passes.sparsify_projections import sparsify_projections
from .passes.verify import verify
from .projection import Projection, fake, fake_mode_of
from .stages import Stages


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


def rewrite(
    analysis: Analysis,
    decisions: Decisions,
    stages: Stages | None = None,
    *,
    fuse: bool = True,
) -> Rewritten:
    """Rewrite a copy of the graph by ``decisions``, one for each projection.

    ``stages`` takes down the graph after each pass. Without ``fuse`` selections stay nodes of
    their own, even where a sparse matrix unit would take them.
    """
    gm, nodes = copy_graph(analysis.gm)
    projections = [_moved(projection, nodes) for projection in analysis.projections]
    rows = token_hints(projections)
    done = sparsify_projections(
        gm,
        list(zip(projections, decisions, strict=True)),
        [analysis.min_tokens * max(1, own // max(1, rows[0])) for own in rows],
    )
    verify(gm, amber_only=True)
    if stages is not None:
        stages.take("sparsify_projections", gm, done.sites)
    settings = [decision.settings for decision in decisions if decision.settings]
    if fuse and fuse_projections(gm, done.sites, settings):
        verify(gm, amber_only=True)
        if stages is not None:
            stages.take("fuse_projections", gm, done.sites)
    at = positions(gm)
    derived = tuple(Derived(at[one.weight], one.key) for one in done.factors)
    values = [_input_like(fake(node)) for node in list(at)[len(analysis.inputs) :]]
    return Rewritten(gm, derived, values, done.sites)


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
