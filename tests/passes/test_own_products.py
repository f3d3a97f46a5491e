"""What Amber has put into a graph is known again, and nothing else is taken for it."""

from dataclasses import replace

import pytest
from programs import GATE, B, Q, W, X, silu_and_multiply, sparsify
from torch import nn
from torch.nn.functional import linear

from amber_compile.decision import Decision
from amber_compile.graph import copy_graph
from amber_compile.kernels import nm_select
from amber_compile.naming import PARAMETER
from amber_compile.passes import find_projections, sparsify_projections
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.passes.own_products import is_own
from amber_compile.passes.quantize_projections import products_of, quantize_projections
from amber_compile.quantization import Quantization


def own(capture, function, *inputs):
    """Return which products of a graph are Amber's own."""
    gm, _ = capture(function, *inputs)
    return [is_own(one.node) for one in find_projections(gm)]


@pytest.mark.parametrize("given", [(X, W), (X, W, B)])
def test_both_halves_of_a_gate_that_was_split(capture, given):
    def function(x, *parameters):
        return silu_and_multiply(linear(x, *parameters))

    gm, _ = copy_graph(capture(function, *given)[0])
    sparsify(GATE)(gm)
    gate, up = find_projections(gm)
    assert not is_own(gate.node)  # it reads a selection, which says enough
    assert is_own(up.node)


def test_a_whole_product_behind_a_selection_is_none(capture):
    def function(x, w, q):
        return linear(nm_select(x, None, 2, 4), w), linear(x, q)

    assert own(capture, function, X, W, Q) == [False, False]


def test_parts_of_a_weight_without_a_selection_are_none(capture):
    def function(x, w):
        return linear(x, w[:4]), linear(x, w[4:])

    assert own(capture, function, X, W) == [False, False]


def test_parts_of_another_weight_are_none(capture):
    def function(x, w, q):
        return linear(nm_select(x, None, 2, 4), w[:4]), linear(x, q[4:])

    assert own(capture, function, X, W, Q) == [False, False]


class Gated(nn.Module):
    """A fused gate and up projection, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.q_proj = nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x):
        return silu_and_multiply(self.gate_up_proj(self.q_proj(self.q_proj(x))))


@pytest.mark.parametrize("part", ["gate", None])
def test_a_quantised_projection_has_its_whole_shape(capture, part):
    gm, _ = copy_graph(capture(Gated(), X)[0])
    inputs, found = DerivedInputs(gm), find_projections(gm)
    how = Quantization("int8")
    parts = [None, None, part]
    decided = [
        (one, Decision(replace(GATE, part=part), quantization=how))
        for one, part in zip(found, parts, strict=True)
    ]
    done = sparsify_projections(gm, decided, None, inputs)
    quantize_projections(gm, products_of(decided, done.halves), inputs)
    for _, node in inputs.items():
        node.meta[PARAMETER] = ""  # as a buffer of an exported program
    again = find_projections(gm)
    assert len(again) == (4 if part else 3)
    assert {one.name: one.shape for one in again} == {one.name: one.shape for one in found}
    assert all(is_own(one.node) for one in again)
