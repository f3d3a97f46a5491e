"""Sparsify the gate of a fused gate and up projection, and what experts read.

Factors come after the inputs of ``after``, in the order in which the pass appends them.
"""

import pytest
import torch
from programs import GATE, NORM, PLAIN, B, Q, W, X, rewrite_all, silu_and_multiply, sparsify
from torch import nn
from torch.nn.functional import grouped_mm, linear

from amber_compile import Pattern, Settings
from amber_compile.derivations import Matrix, ScoreFactor
from amber_compile.kernels import nm_select

# ---- gate and up in one ----


@pytest.mark.parametrize(
    "halves",
    [
        lambda y: y.chunk(2, dim=-1),
        lambda y: (y[..., :4], y[..., 4:]),
        lambda y: y.split([4, 4], -1),
        lambda y: (y.narrow(-1, 0, 4), y.chunk(2, -1)[1]),
    ],
)
def test_only_the_gate_half_reads_the_selection(assert_rewrites, halves):
    def before(x, w):
        gate, up = halves(linear(x, w))
        return nn.functional.silu(gate) * up

    def after(x, w):
        s = nm_select(x, None, 2, 4)
        gate = linear(s, w[0:4])
        up = linear(x, w[4:])
        return nn.functional.silu(gate) * up

    assert_rewrites(sparsify(GATE), before, after, X, W, sites=1)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_bias_is_split_with_the_weight(assert_rewrites, keyword):
    def project(x, w, b):
        return linear(x, w, bias=b) if keyword else linear(x, w, b)

    def before(x, w, b):
        return silu_and_multiply(project(x, w, b))

    def after(x, w, b):
        s = nm_select(x, None, 2, 4)
        gate = project(s, w[0:4], b[0:4])
        up = project(x, w[4:], b[4:])
        return nn.functional.silu(gate) * up

    assert_rewrites(sparsify(GATE), before, after, X, W, B, sites=1)


def test_the_factor_of_a_gate_is_that_of_its_rows(assert_rewrites):
    settings = Settings(Pattern(2, 4), "weight_norm", part="gate")

    def before(x, w):
        return silu_and_multiply(linear(x, w))

    def after(x, w, factor):
        s = nm_select(x, factor, 2, 4)
        gate = linear(s, w[0:4])
        up = linear(x, w[4:])
        return nn.functional.silu(gate) * up

    done = assert_rewrites(sparsify(settings), before, after, X, W, sites=1)
    assert [one.request for one in done.inputs.requests] == [
        ScoreFactor("weight_norm", Matrix(stop=4))
    ]


def test_without_part_both_halves_read_the_selection(assert_rewrites):
    def before(x, w):
        return silu_and_multiply(linear(x, w))

    def after(x, w):
        return silu_and_multiply(linear(nm_select(x, None, 2, 4), w))

    assert_rewrites(sparsify(PLAIN), before, after, X, W, sites=1)


def test_a_gate_shares_the_selection_of_its_neighbour(assert_rewrites):
    def before(x, q, w):
        return linear(x, q), silu_and_multiply(linear(x, w))

    def after(x, q, w):
        s = nm_select(x, None, 2, 4)
        q = linear(s, q)
        gate = linear(s, w[0:4])
        up = linear(x, w[4:])
        return q, nn.functional.silu(gate) * up

    assert_rewrites(sparsify(PLAIN, GATE), before, after, X, Q, W, sites=2)


def test_a_gate_of_symbolic_rows_is_split(assert_rewrites):
    def before(x, w):
        return silu_and_multiply(linear(x, w))

    def after(x, w):
        s = nm_select(x, None, 2, 4)
        gate = linear(s, w[0:4])
        up = linear(x, w[4:])
        return nn.functional.silu(gate) * up

    assert_rewrites(sparsify(GATE), before, after, X, W, sites=1, dynamic=True)


def test_a_split_gate_is_not_split_again(assert_rewrites):
    def once(x, w):
        s = nm_select(x, None, 2, 4)
        gate = linear(s, w[0:4])
        up = linear(x, w[4:])
        return nn.functional.silu(gate) * up

    assert_rewrites(rewrite_all(GATE), once, once, X, W, sites=0)


# ---- autocast ----


def test_a_gate_is_split_under_autocast(assert_rewrites):
    def before(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return silu_and_multiply(linear(x, w))

    def after(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            s = nm_select(x, None, 2, 4)
            gate = linear(s, w[0:4])
            up = linear(x, w[4:])
            return nn.functional.silu(gate) * up

    assert_rewrites(sparsify(GATE), before, after, X, W, sites=1)


def test_autocast_around_the_call_is_none_of_the_graph(assert_rewrites):
    def before(x, w):
        return silu_and_multiply(linear(x, w))

    def after(x, w):
        s = nm_select(x, None, 2, 4)
        gate = linear(s, w[0:4])
        up = linear(x, w[4:])
        return nn.functional.silu(gate) * up

    with torch.autocast("cpu", torch.bfloat16):
        assert_rewrites(sparsify(GATE), before, after, X, W, sites=1)


# ---- experts ----


ROWS = torch.randn(8, 16).bfloat16()
EXPERTS = nn.Parameter(torch.randn(2, 8, 16).bfloat16())  # [E, N, K], read transposed
ENDS, OTHERS = (torch.tensor([end, 8], dtype=torch.int32) for end in (3, 5))


def test_a_factor_of_experts_goes_with_their_rows(assert_rewrites):
    def before(x, w, ends):
        return grouped_mm(x, w.transpose(-2, -1), offs=ends)

    def after(x, w, ends, factor):
        turned = w.transpose(-2, -1)
        return grouped_mm(nm_select(x, factor, 2, 4, offsets=ends), turned, offs=ends)

    done = assert_rewrites(sparsify(NORM), before, after, ROWS, EXPERTS, ENDS, sites=1)
    (factor,) = done.inputs.requests
    assert factor.request == ScoreFactor("weight_norm")


def test_other_ends_are_another_selection(assert_rewrites):
    def before(x, w, ends, others):
        turned = w.transpose(-2, -1)
        return grouped_mm(x, turned, offs=ends), grouped_mm(x, turned, offs=others)

    def after(x, w, ends, others, factor):
        turned = w.transpose(-2, -1)
        one = grouped_mm(nm_select(x, factor, 2, 4, offsets=ends), turned, offs=ends)
        return one, grouped_mm(nm_select(x, factor, 2, 4, offsets=others), turned, offs=others)

    assert_rewrites(sparsify(NORM), before, after, ROWS, EXPERTS, ENDS, OTHERS, sites=2)


def test_without_a_factor_it_does_not_matter_whose_rows_they_are(assert_rewrites):
    def before(x, w, ends, others):
        turned = w.transpose(-2, -1)
        return grouped_mm(x, turned, offs=ends), grouped_mm(x, turned, offs=others)

    def after(x, w, ends, others):
        turned = w.transpose(-2, -1)
        s = nm_select(x, None, 2, 4)
        return grouped_mm(s, turned, offs=ends), grouped_mm(s, turned, offs=others)

    assert_rewrites(sparsify(PLAIN), before, after, ROWS, EXPERTS, ENDS, OTHERS, sites=2)


def test_the_gates_of_experts_are_split_off(assert_rewrites):
    settings = Settings(Pattern(2, 4), "weight_norm", part="gate")

    def before(x, w, ends):
        return silu_and_multiply(grouped_mm(x, w.transpose(-2, -1), offs=ends))

    def after(x, w, ends, factor):
        turned = w.transpose(-2, -1)
        s = nm_select(x, factor, 2, 4, offsets=ends)
        gate = grouped_mm(s, turned[..., 0:4], offs=ends)
        up = grouped_mm(x, turned[..., 4:], offs=ends)
        return nn.functional.silu(gate) * up

    done = assert_rewrites(sparsify(settings), before, after, ROWS, EXPERTS, ENDS, sites=1)
    assert [one.request for one in done.inputs.requests] == [
        ScoreFactor("weight_norm", Matrix(stop=4))
    ]
