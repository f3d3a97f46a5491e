"""Quantise projections: activations on each call, a scale per token; weights once, one per output.

    y = linear(x, w, b)     ->   codes, scale = quantize_rows(x, smooth)
                                 y = quantized_linear(codes, scale, w8, w_scale, b, y.dtype)

``w8`` and ``w_scale`` are further inputs of the graph, made once from ``w``; ``smooth`` is a tensor
of the plan, or absent. ``x`` may be a selection: its zeros have code 0, and the scale comes from
what was kept. Projections that read one ``x`` share its codes, if they share the smooth vector. An
output scale and bias of the plan go into the product's own scale and bias. Both halves of a gate
and up projection that was split are quantised. Left alone: projections that were decided so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.decision import Decision
from amber_compile.derivations import Calibrated, Matrix, Quantized, WeightCodes, WeightScale
from amber_compile.graph import erase_unread, insert_call, storage_of, written_storages
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.passes.find_projections import LINEARS
from amber_compile.plan_tensors import PlanTensors
from amber_compile.projection import Projection, fake
from amber_compile.quantization import Quantization

aten = torch.ops.aten
MATMULS = (torch.mm, torch.matmul, operator.matmul, "mm", "matmul", "__matmul__", aten.mm.default)
ADDMMS = (torch.addmm, aten.addmm.default)
Halves = Mapping[Node, tuple[Node, Node]]
"""The gate and the up half of each fused projection that was split."""
Same = Callable[[str, str, str], bool]
"""``same("smooth", one, other)``: whether two sites have equal tensors of a name."""


class Operands(NamedTuple):
    """What a product multiplies, and what it adds."""

    x: Node
    bias: Node | None


@dataclass(frozen=True, slots=True)
class Product:
    """A matmul to be quantised: a projection, or a half of one.

    Attributes:
        node: the matmul.
        projection: the projection it belongs to.
        matrix: the part of the projection's weight that it multiplies by.
        decision: of the projection; the ``up`` half of a split one is dense.
    """

    node: Node
    projection: Projection
    matrix: Matrix
    decision: Decision

    @property
    def quantization(self) -> Quantization:
        """How it is quantised."""
        assert self.decision.quantization is not None
        return self.decision.quantization


def quantize_projections(
    gm: GraphModule,
    products: Sequence[Product],
    inputs: DerivedInputs,
    tensors: PlanTensors | None = None,
    same: Same = lambda name, one, other: one == other,
) -> dict[Node, Node]:
    """Quantise each of ``products``; return the new product of each old one.

    Args:
        gm: the graph to change.
        products: what ``products_of`` found.
        inputs: where the further inputs of the graph are kept.
        tensors: of the plan.
        same: whether two sites have equal tensors, in every layer that shares the graph.
    """
    tensors = tensors or PlanTensors()
    quantizer = _Quantizer(gm, inputs, tensors, same)
    done = {product.node: quantizer.replace(product) for product in products}
    gm.recompile()
    return done


def products_of(decided: Sequence[tuple[Projection, Decision]], halves: Halves) -> list[Product]:
    """Return the matmuls of the projections that are decided to be quantised.

    ``halves`` tells of those that ``sparsify_projections`` has split into a gate and an up half.
    """
    found = []
    for projection, decision in decided:
        if decision.quantization is None:
            continue
        transposed, rows = projection.transposed, projection.gate_rows
        if projection.node not in halves:
            found.append(Product(projection.node, projection, Matrix(transposed), decision))
            continue
        gate, up = halves[projection.node]
        whole = Decision(reason="the up half", quantization=decision.quantization)
        found.append(Product(gate, projection, Matrix(transposed, 0, rows), decision))
        found.append(Product(up, projection, Matrix(transposed, rows or 0), whole))
    return found


def operands_of(node: Node) -> Operands | None:
    """Return what a linear, addmm or matmul multiplies and adds; None if it is another product."""
    names = ("input", "weight", "bias")
    if node.target in LINEARS:
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
    elif node.target in ADDMMS and len(node.args) == 3 and not node.kwargs:
        given = dict(zip(("bias", "input", "weight"), node.args, strict=True))
    elif node.target in MATMULS and len(node.args) == 2 and not node.kwargs:
        given = {"input": node.args[0]}
    else:
        return None
    x, bias = given["input"], given.get("bias")
    if not isinstance(x, Node) or (bias is not None and not isinstance(bias, Node)):
        return None
    if bias is not None and fake(bias).shape != fake(node).shape[-1:]:
        return None
    return Operands(x, bias)


def bias_of(node: Node) -> Node | None:
    """Return what a linear or addmm adds, if it adds something."""
    operands = operands_of(node)
    return operands and operands.bias


def quantizer_of(product: Node) -> Node:
    """Return the node that quantises what a quantised product reads."""
    (codes,) = product.all_input_nodes[:1]
    return codes.all_input_nodes[0]


def takes_epilogue(decision: Decision, node: Node) -> bool:
    """Whether the output scale and bias of a site become those of a quantised product."""
    operands = operands_of(node)
    return decision.quantization is not None and operands is not None and operands.bias is None


class _Quantizer:
    """Replace products one by one, sharing codes."""

    def __init__(
        self, gm: GraphModule, inputs: DerivedInputs, tensors: PlanTensors, same: Same
    ) -> None:
        self._graph = gm.graph
        self._inputs = inputs
        self._tensors = tensors
        self._same = same
        self._written = written_storages(gm.graph)
        self._codes: list[tuple[Node, str, Calibrated | None, tuple[Node, Node]]] = []

    def replace(self, product: Product) -> Node:
        """Put the quantised product in the place of ``product``."""
        node = product.node
        operands = operands_of(node)
        assert operands is not None, "decide_quantization lets no other spelling pass"
        smooth = self._smooth(product)
        codes, row_scale = self._quantized(product, operands.x, smooth)
        weight, scale, bias = self._weight(product, operands, smooth)
        new = insert_call(
            *(self._graph, node, torch.ops.amber.quantized_linear.default),
            *(codes, row_scale, weight, scale, bias, fake(node).dtype),
        )
        node.replace_all_uses_with(new)
        unread = node.all_input_nodes
        self._graph.erase_node(node)
        for operand in unread:
            erase_unread(self._graph, operand)
        return new

    def _smooth(self, product: Product) -> Calibrated | None:
        name = product.projection.name
        if product.quantization.smooth is None:
            return None
        return Calibrated(name, "smooth", self._tensors, (product.projection.channels,))

    def _quantized(self, product: Product, x: Node, smooth: Calibrated | None) -> tuple[Node, Node]:
        """Return codes and scales of ``x``: those of an earlier product where they are equal."""
        dtype = product.quantization.dtype
        if storage_of(fake(x)) not in self._written:
            for known, format_, vector, codes in self._codes:
                if known is x and format_ == dtype and self._equal(vector, smooth):
                    return codes
        weight = product.projection.weight
        vector_node = smooth and self._inputs.node(weight, smooth, "smooth")
        both = insert_call(
            *(self._graph, product.node, torch.ops.amber.quantize_rows.default),
            *(x, vector_node, dtype),
        )
        parts = [
            insert_call(self._graph, product.node, operator.getitem, both, at) for at in (0, 1)
        ]
        codes = (parts[0], parts[1])
        self._codes.append((x, dtype, smooth, codes))
        return codes

    def _equal(self, one: Calibrated | None, other: Calibrated | None) -> bool:
        if one is None or other is None:
            return one is other
        return one.site == other.site or self._same("smooth", one.site, other.site)

    def _weight(
        self, product: Product, operands: Operands, smooth: Calibrated | None
    ) -> tuple[Node, Node, Node | None]:
        """Return the inputs for codes, scale and bias of the product's weight."""
        parameter, settings = product.projection.weight, product.decision.settings
        rows = fake(product.node).shape[-1]

        def calibrated(name: str, *shape: int) -> Calibrated:
            return Calibrated(product.projection.name, name, self._tensors, shape)

        updated = settings is not None and settings.updated_weight
        source = calibrated("weight", rows, product.projection.channels) if updated else None
        quantized = Quantized(product.quantization, product.matrix, smooth, source)
        outputs: tuple[Calibrated, ...] = ()
        bias = operands.bias
        if settings is not None and takes_epilogue(product.decision, product.node):
            outputs = (calibrated("output_scale", rows),) if settings.output_scale else ()
            if settings.output_bias:
                request = calibrated("output_bias", rows)
                bias = self._inputs.node(parameter, request, "output_bias")
        codes = self._inputs.node(parameter, WeightCodes(quantized), quantized.quantization.dtype)
        scale = self._inputs.node(parameter, WeightScale(quantized, outputs), "weight_scale")
        return codes, scale, bias
