"""Rewrite a copy of an analysed graph for one set of decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from .analysis import Analysis, Decisions
from .binding import Derived
from .graph import copy_graph, positions
from .passes.classify_phase import token_hints
from .passes.derived_inputs import DerivedInputs
from .passes.fuse_projections import fuse_projections
from .passes.fuse_selections import fuse_selections
from .passes.quantize_projections import (
    Halves,
    Product,
    bias_of,
    products_of,
    quantize_projections,
    quantizer_of,
)
from .passes.smooth_projections import FOLDED, smooth_projections
from .passes.sparsify_projections import Decided, sparsify_projections
from .passes.spell_in_aten import is_aten, spell_in_aten
from .passes.verify import verify
from .projection import Projection, fake, fake_mode_of
from .release import matrices_read
from .stages import Stages


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a graph.

    Attributes:
        gm: the copy.
        derived: its further inputs, to be computed from the weights on each call.
        values: their fake values.
        sites: each rewritten projection, and the selection that its matmul now reads.
        reads: argument positions of the weights whose values the copy reads.
        products: each quantised matmul, and the bias it had before.
        smoothing: where the smooth vector of a projection is applied, by its name in the graph.
    """

    gm: GraphModule
    derived: tuple[Derived, ...]
    values: list[torch.Tensor]
    sites: list[tuple[Projection, Node]]
    reads: tuple[int, ...] = ()
    products: tuple[tuple[Product, Node | None], ...] = ()
    smoothing: Mapping[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """How many matmuls read a selection or are quantised."""
        quantized = {product.node for product, _ in self.products}
        return len(quantized | {site.node for site, _ in self.sites})


def rewrite_graph(
    analysis: Analysis,
    decisions: Decisions,
    stages: Stages | None = None,
    *,
    fuse: bool = True,
    inputs: type[DerivedInputs] = DerivedInputs,
    in_place: bool = False,
) -> Rewritten:
    """Rewrite a copy of the graph by ``decisions``, one for each projection.

    Args:
        analysis: of the graph.
        decisions: what becomes of each of its projections.
        stages: takes down the graph after each pass.
        fuse: without it selections stay nodes of their own, even where one kernel would take them
            with what follows.
        inputs: how the graph gets what is derived from its weights.
        in_place: rewrite the graph itself.
    """
    in_aten = is_aten(analysis.gm)
    gm, nodes = (analysis.gm, {}) if in_place else copy_graph(analysis.gm)
    projections = [_moved(projection, nodes) for projection in analysis.projections]
    decided = list(zip(projections, decisions, strict=True))
    work = _Work(analysis, gm, decided, stages, inputs(gm))
    work.sparsify()
    work.quantize()
    work.smooth(fold=fuse and analysis.config.fold_smooth)
    if fuse:
        work.fuse()
    if in_aten:
        spell_in_aten(gm)
    at = positions(gm)
    asked = [(wanted, node) for wanted, node in work.inputs.items() if node in at]
    derived = tuple(Derived(at[wanted.weight], wanted.request) for wanted, _ in asked)
    values = [_input_like(fake(node)) for _, node in asked]
    products = tuple(work.products)
    reads = matrices_read(gm)
    return Rewritten(gm, derived, values, work.sites, reads, products, work.smoothing)


class _Work:
    """A graph on its way through the passes, verified and taken down after each."""

    def __init__(
        self,
        analysis: Analysis,
        gm: GraphModule,
        decided: Decided,
        stages: Stages | None,
        inputs: DerivedInputs,
    ) -> None:
        self._analysis = analysis
        self._gm = gm
        self._decided = decided
        self._stages = stages
        self._halves: Halves = {}
        self.products: list[tuple[Product, Node | None]] = []
        self.smoothing: dict[str, str] = {}
        self.inputs = inputs
        self.sites: list[tuple[Projection, Node]] = []

    def sparsify(self) -> None:
        rows = token_hints([projection for projection, _ in self._decided])
        least = [self._analysis.min_tokens * max(1, own // max(1, rows[0])) for own in rows]
        done = sparsify_projections(
            self._gm, self._decided, least, self.inputs, self._analysis.tensors
        )
        self.sites, self._halves = done.sites, done.halves
        self._done("sparsify_projections")

    def quantize(self) -> None:
        products = products_of(self._decided, self._halves)
        if not products:
            return
        tensors, same = self._analysis.tensors, self._analysis.same_tensor
        biases = [bias_of(product.node) for product in products]
        moved = quantize_projections(self._gm, products, self.inputs, tensors, same)
        self.products = [
            (replace(product, node=moved[product.node]), bias)
            for product, bias in zip(products, biases, strict=True)
        ]
        self.sites = [
            (replace(site, node=moved.get(site.node, site.node)), selected)
            for site, selected in self.sites
        ]
        self._done("quantize_projections")

    def smooth(self, *, fold: bool) -> None:
        places = smooth_projections(self._gm, self.inputs, self._analysis.same_tensor, fold=fold)
        for product, _ in self.products:
            if place := places.get(quantizer_of(product.node)):
                self.smoothing[product.projection.name] = place
        if any(place.startswith(FOLDED) for place in places.values()):
            self._done("smooth_projections")

    def fuse(self) -> None:
        settings = [decision.settings for _, decision in self._decided if decision.settings]
        if fuse_projections(self._gm, self.sites, settings):
            self._done("fuse_projections")
        if self.products and fuse_selections(self._gm):
            self._done("fuse_selections")

    def _done(self, name: str) -> None:
        verify(self._gm, amber_only=True)
        if self._stages is not None:
            self._stages.take(name, self._gm, self.sites)


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
