"""When a projection is a gate and an up projection in one, by its graph alone."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear, silu

from amber_compile.passes.fused_gate import gate_rows

X = torch.randn(2, 4, 16)
W = nn.Parameter(torch.randn(8, 16))


@pytest.fixture
def rows(capture):
    """Return ``rows(function)``: the gate's rows in the graph of ``function(linear(x, w))``."""

    def run(function, dynamic=None):
        gm, _ = capture(lambda x, w: function(linear(x, w)), X, W, dynamic=dynamic)
        node = next(node for node in gm.graph.nodes if node.target is torch._C._nn.linear)
        return gate_rows(node)

    return run


def halves(y):
    return y.chunk(2, dim=-1)


def silu_and_multiply(y):
    gate, up = halves(y)
    return silu(gate) * up


def multiply_by_silu(y):
    gate, up = halves(y)
    return up * silu(gate)


def method_and_function(y):
    gate, up = torch.chunk(y, 2, -1)
    return torch.mul(gate.sigmoid(), up)


def last_dimension_by_number(y):
    gate, up = y.chunk(2, 2)
    return gelu(gate, approximate="tanh").mul(up)


def slices(y):
    return silu(y[..., :4]) * y[..., 4:]


def narrowed(y):
    return silu(y.narrow(-1, 0, 4)) * y.narrow(-1, 4, 4)


def split_by_size(y):
    gate, up = y.split(4, dim=-1)
    return silu(gate) * up


@pytest.mark.parametrize(
    "function",
    [
        silu_and_multiply,
        multiply_by_silu,
        method_and_function,
        last_dimension_by_number,
        slices,
        narrowed,
        split_by_size,
    ],
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_gate(rows, function, dynamic):
    assert rows(function, dynamic=dynamic) == 4


def second_half_activated(y):
    up, gate = halves(y)
    return silu(gate) * up


def not_activated(y):
    gate, up = halves(y)
    return gate * up


def added(y):
    gate, up = halves(y)
    return silu(gate) + up


def two_activations(y):
    gate, up = halves(y)
    return silu(gate) * silu(up)


def gate_used_twice(y):
    gate, up = halves(y)
    return silu(gate) * up + gate


def activation_used_twice(y):
    gate, up = halves(y)
    gate = silu(gate)
    return gate * up + gate


def product_used_twice_is_fine(y):
    product = silu_and_multiply(y)
    return product + product.relu()


def up_used_twice_is_fine(y):
    gate, up = halves(y)
    return silu(gate) * up + up


def projection_used_twice(y):
    return silu_and_multiply(y) + y.sum()


def with_a_third_operand(y):
    gate, up = halves(y)
    return silu(gate) * (up * 2)


def activation_of_two(y):
    gate, up = halves(y)
    return torch.where(up > 0, gate, 0) * up


def other_dimension(y):
    gate, up = y.chunk(2, dim=1)
    return silu(gate) * up


def first_dimension_by_default(y):
    gate, up = y.chunk(2)
    return silu(gate) * up


def four_parts(y):
    gate, up, _, _ = y.chunk(4, dim=-1)
    return silu(gate) * up


def interleaved(y):
    return silu(y[..., ::2]) * y[..., 1::2]


def unequal_slices(y):
    return silu(y[..., :2]) * y[..., 2:4]


def overlapping_slices(y):
    return silu(y[..., :4]) * y[..., 2:6]


def rows_instead_of_channels(y):
    return silu(y[:1]) * y[1:]


def only_the_gate(y):
    return silu(halves(y)[0])


@pytest.mark.parametrize(
    "function",
    [
        second_half_activated,
        not_activated,
        added,
        two_activations,
        gate_used_twice,
        activation_used_twice,
        projection_used_twice,
        with_a_third_operand,
        activation_of_two,
        other_dimension,
        first_dimension_by_default,
        four_parts,
        interleaved,
        unequal_slices,
        overlapping_slices,
        rows_instead_of_channels,
        only_the_gate,
        torch.relu,
    ],
)
def test_no_gate(rows, function):
    assert rows(function) is None


@pytest.mark.parametrize("function", [product_used_twice_is_fine, up_used_twice_is_fine])
def test_what_follows_does_not_matter(rows, function):
    assert rows(function) == 4


def test_halves_of_unequal_size(capture):
    def function(x, w):
        gate, up = linear(x, w).chunk(2, dim=-1)
        return silu(gate).sum() * up

    gm, _ = capture(function, X, nn.Parameter(torch.randn(7, 16)))
    assert all(gate_rows(node) is None for node in gm.graph.nodes if node.op == "call_function")
