"""Fold smooth vectors into what computes the activations, where the graph proves that they may be.

    x = w * normalised                   ->   x = (w · v) * normalised
    x = layer_norm(h, shape, w, b)       ->   x = layer_norm(h, shape, w · v, b · v)
    u = quantized_linear(c, s, W, ws, b)  ->  u = quantized_linear(c, s, W, ws · v, b · v)
    x = act(gate) * u                         x = act(gate) * u
    codes, scale = quantize_rows(x, v)   ->   codes, scale = quantize_rows(x, None)

``w · v`` and the like are further inputs, made once from the parameters, which stay as they are.
x · v comes out as before, up to rounding in the type of ``w`` and ``x``. Casts, reshapes that keep
the channels, and ``1 + w`` are seen through; any product with a parameter of one number a channel
counts, for nothing else of a norm matters. Left to the quantise kernel, with the reason: what
anything else reads (a projection in 16 bit, a selection, which compares unsmoothed values, the
graph's output) or writes to, vectors that differ, sums, and float16, which might overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, GraphModule, Node

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.derivations import Calibrated, ScaledVector, WeightScale
from amber_compile.graph import erase_unread, storage_of, written_storages
from amber_compile.naming import parameter_path
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.passes.fused_gate import PRODUCTS
from amber_compile.passes.quantize_projections import Same
from amber_compile.passes.vector_operand import (
    NORMS,
    SUMS,
    Vector,
    as_vector,
    vector_operand,
    vectors_of_norm,
)
from amber_compile.passes.weight_operand import CASTS, operation
from amber_compile.projection import fake, value_of

KERNEL, FOLDED = "in the quantise kernel", "folded into"
PASSED = CASTS | {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
"""Steps that change neither the values of a row nor, where the last size stays, what is in it."""
QUANTIZE, LINEAR = torch.ops.amber.quantize_rows.default, torch.ops.amber.quantized_linear.default


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of a quantised product, which are to be multiplied."""

    product: Node


Change = Vector | Scale


def smooth_projections(
    gm: GraphModule, inputs: DerivedInputs, same: Same, *, fold: bool = True
) -> dict[Node, str]:
    """Fold what can be folded; return where each quantise node's smooth vector is applied.

    Args:
        gm: a graph whose projections are quantised.
        inputs: its further inputs.
        same: whether two sites have equal tensors, in every layer that shares the graph.
        fold: whether to; else every vector is left to its quantise node.
    """
    folder = _Folder(gm, inputs, same)
    places: dict[Node, str] = {}
    for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE):
        if node not in places and node.args[1] is not None:
            places |= folder.fold(node) if fold else {node: KERNEL}
    inputs.drop_unread()
    gm.recompile()
    return places


class _Folder:
    """Folds vectors one by one."""

    def __init__(self, gm: GraphModule, inputs: DerivedInputs, same: Same) -> None:
        self._graph: Graph = gm.graph
        self._inputs = inputs
        self._same = same
        self._written = written_storages(gm.graph)

    def fold(self, node: Node) -> dict[Node, str]:
        """Fold the vector of a quantise node; return where it and those beside it are applied."""
        smooth = self._vector(node)
        start = _origin(_source(node))
        readers = list(_readers(start))
        reason = self._why_not(start, readers, smooth)
        changes = reason or self._changes(start)
        if isinstance(changes, str):
            return {node: f"{KERNEL}: {changes}"}
        for change in changes:
            self._apply(change, smooth)
        for reader in readers:
            reader.update_arg(1, None)
        into = " and ".join(dict.fromkeys(_name(change, self._inputs) for change in changes))
        return dict.fromkeys(readers, f"{FOLDED} {into}")

    def _vector(self, node: Node) -> Calibrated:
        held = node.args[1]
        asked = self._inputs.asked(held) if isinstance(held, Node) else None
        assert asked is not None, "quantise nodes read their vectors from inputs"
        assert isinstance(asked.request, Calibrated)
        return asked.request

    def _why_not(self, start: Node, readers: Sequence[Node], smooth: Calibrated) -> str | None:
        """Return why what ``start`` computes may not change, or None if it may."""
        if fake(start).dtype == torch.float16:
            return "float16 might overflow"
        if storage_of(fake(start)) in self._written:
            return "its input is written to"
        for reader in readers:
            if reader.target is not QUANTIZE:
                return f"{_words(reader)} reads its input too"
            if reader.args[1] is None or not self._equal(self._vector(reader), smooth):
                return "projections of the same input have other vectors"
        return None

    def _equal(self, one: Calibrated, other: Calibrated) -> bool:
        return one == other or self._same("smooth", one.site, other.site)

    def _changes(self, node: Node) -> Sequence[Change] | str:
        """Return what to change so that the output of ``node`` is smooth, or why that cannot be."""
        if node.target is LINEAR:
            return self._of_product(node)
        step = operation(node)
        if step in NORMS:
            found = vectors_of_norm(node)
            return found or "its norm has no weight of its own"
        vector = vector_operand(node)
        if node.target in PRODUCTS and vector is not None:
            return [vector]
        if node.target in PRODUCTS:
            return self._of_factors(node)
        if step in SUMS and vector is not None:
            return self._behind(node, vector)
        return f"its input comes from {_words(node)}"

    def _behind(self, node: Node, bias: Vector) -> Sequence[Change] | str:
        """Return the changes for a sum of something and a bias."""
        others = [one for one in node.all_input_nodes if one is not bias.operand]
        below = self._own(node, others[0])
        return below if isinstance(below, str) else [*below, bias]

    def _of_factors(self, node: Node) -> Sequence[Change] | str:
        """Return the changes for one factor of a product of two activations."""
        found = [self._own(node, factor) for factor in reversed(node.all_input_nodes)]
        return next((one for one in found if not isinstance(one, str)), found[0])

    def _own(self, node: Node, operand: Node) -> Sequence[Change] | str:
        """Return the changes for an operand of ``node`` that nothing else reads."""
        if fake(operand).shape[-1:] != fake(node).shape[-1:]:
            return "its channels are broadcast"
        start = _origin(operand)
        if list(_readers(start)) != [node]:
            return f"another node reads {_words(start)}"
        return self._changes(start)

    @staticmethod
    def _of_product(node: Node) -> Sequence[Change] | str:
        bias = node.args[4]
        if bias is None:
            return [Scale(node)]
        vector = as_vector(node, bias)
        return "the bias of a product is computed" if vector is None else [Scale(node), vector]

    def _apply(self, change: Change, smooth: Calibrated) -> None:
        if isinstance(change, Scale):
            self._scale(change.product, smooth)
            return
        dtype = fake(change.operand).dtype
        request = ScaledVector(smooth, change.offset, dtype)
        new = self._inputs.node(change.parameter, request, "smooth_vector")
        change.user.replace_input_with(change.operand, new)
        erase_unread(self._graph, change.operand)

    def _scale(self, product: Node, smooth: Calibrated) -> None:
        held = product.args[3]
        asked = self._inputs.asked(held) if isinstance(held, Node) else None
        assert asked is not None, "quantised products read their scales from inputs"
        assert isinstance(asked.request, WeightScale)
        request = replace(asked.request, outputs=(*asked.request.outputs, smooth))
        product.update_arg(3, self._inputs.node(asked.weight, request, "weight_scale"))


# ---- looking around ------------------------------------------------------------------------------


def _origin(node: Node) -> Node:
    """Follow ``node`` back through casts and reshapes that keep its channels."""
    while operation(node) in PASSED and _keeps_channels(node):
        node = _source(node)
    return node


def _readers(node: Node) -> Iterator[Node]:
    """Yield what reads the output of ``node``, seen through casts and reshapes."""
    for user in node.users:
        passed = operation(user) in PASSED and _keeps_channels(user) and _source(user) is node
        if passed and user.all_input_nodes.count(node) == 1:
            yield from _readers(user)
        else:
            yield user


def _keeps_channels(node: Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.op not in ("call_method", "call_function"):
        return False
    before, after = value_of(source), value_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.is_floating_point() and before.shape[-1:] == after.shape[-1:]


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _words(node: Node) -> str:
    said = {"output": "the graph's output", "placeholder": "an input of the graph"}
    return said.get(node.op) or operation(node)


def _name(change: Change, inputs: DerivedInputs) -> str:
    """Return what a change changes: ``input_layernorm``, ``the scales of up_proj``."""
    if isinstance(change, Vector) and change.user.target is not LINEAR:
        return _module(change.parameter)
    held = (change.user if isinstance(change, Vector) else change.product).args[3]
    asked = inputs.asked(held) if isinstance(held, Node) else None
    return f"the scales of {_module(asked.weight) if asked else 'a product'}"


def _module(parameter: Node) -> str:
    """Return the last name of the module that holds a parameter; of a bare one, its own."""
    *_, module, leaf = ["", *parameter_path(parameter).split(".")]
    return module or leaf
