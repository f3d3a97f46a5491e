"""Which projections share a selection, and which must not.

Factors come after the inputs of ``after``, in the order in which the pass appends them.
"""

import operator

import pytest
import torch
from programs import NORM, PLAIN, SQUARE, K, Q, W, X, Y, sparsify
from torch import nn
from torch.nn.functional import dropout, leaky_relu, linear, relu

from amber_compile import Pattern, Settings
from amber_compile.kernels import nm_select


def test_projections_of_one_input_share_a_selection(assert_rewrites):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k):
        x = nm_select(x, None, 2, 4)
        return linear(x, q), linear(x, k)

    assert_rewrites(sparsify(PLAIN), before, after, X, Q, K, sites=2)


def test_factors_of_two_weights_are_two_selections(assert_rewrites):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k, of_q, of_k):
        return linear(nm_select(x, of_q, 2, 4), q), linear(nm_select(x, of_k, 2, 4), k)

    assert_rewrites(sparsify(NORM), before, after, X, Q, K, sites=2)


@pytest.mark.parametrize(
    ("other", "arguments"),
    [
        (Settings(Pattern(4, 8), "magnitude"), {"n": 4, "m": 8}),
        (Settings(Pattern(1, 4), "magnitude"), {"n": 1, "m": 4}),
        (Settings(Pattern(2, 4), "magnitude", "norm"), {"n": 2, "m": 4, "correction": "norm"}),
        (Settings(Pattern(2, 4), "magnitude", None, 2), {"n": 2, "m": 4, "dense_prefix": 2}),
    ],
)
def test_other_settings_are_another_selection(assert_rewrites, other, arguments):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k):
        return linear(nm_select(x, None, 2, 4), q), linear(nm_select(x, None, **arguments), k)

    assert_rewrites(sparsify(PLAIN, other), before, after, X, Q, K, sites=2)


def test_other_row_counts_are_another_selection(assert_rewrites):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k):
        q = linear(nm_select(x, None, 2, 4, min_tokens=8), q)
        return q, linear(nm_select(x, None, 2, 4, min_tokens=16), k)

    assert_rewrites(sparsify(PLAIN, min_rows=[8, 16]), before, after, X, Q, K, sites=2)


def test_two_inputs_are_two_selections(assert_rewrites):
    def before(x, y, w):
        return linear(x, w), linear(y, w)

    def after(x, y, w, factor):
        return linear(nm_select(x, factor, 2, 4), w), linear(nm_select(y, factor, 2, 4), w)

    done = assert_rewrites(sparsify(NORM), before, after, X, Y, W, sites=2)
    assert len(done.inputs.requests) == 1


def test_a_module_called_twice_on_one_input_selects_once(assert_rewrites):
    module = nn.Linear(16, 16, bias=False)

    def before(x, w):
        return linear(x, w) + linear(x, w).relu()

    def after(x, w, factor):
        x = nm_select(x, factor, 2, 4)
        return linear(x, w) + linear(x, w).relu()

    assert_rewrites(sparsify(NORM), before, after, X, module.weight, sites=2)


def test_a_module_called_on_its_own_result_selects_twice(assert_rewrites):
    def before(x, w):
        return linear(linear(x, w), w)

    def after(x, w, factor):
        y = linear(nm_select(x, factor, 2, 4), w)
        return linear(nm_select(y, factor, 2, 4), w)

    assert_rewrites(sparsify(NORM), before, after, X, SQUARE, sites=2)


def set_first(x):
    x[0] = 1.0


WRITES = {
    "method": lambda x: x.add_(1),
    "operator": lambda x: operator.iadd(x, 1),
    "index": set_first,
    "function": lambda x: torch.relu_(x),
    "inplace=": lambda x: relu(x, inplace=True),
    "inplace by position": lambda x: leaky_relu(x, 0.1, True),
    "out=": lambda x: torch.mul(x, 2, out=x),
    "view": lambda x: x.view(-1, 16).mul_(2),
    "row": lambda x: set_first(x[1]),
    "view of a view": lambda x: relu(x.transpose(0, 1)[1], inplace=True),
    "operator overload": lambda x: torch.ops.aten.mul_.Tensor(x, x),
    "operator packet": lambda x: torch.ops.aten.mul_(x, x),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_selection_is_not_shared_past_a_write(assert_rewrites, write):
    def before(x, q, k):
        x = x + 1
        q = linear(x, q)
        write(x)
        return q, linear(x, k)

    def after(x, q, k):
        x = x + 1
        q = linear(nm_select(x, None, 2, 4), q)
        write(x)
        return q, linear(nm_select(x, None, 2, 4), k)

    assert_rewrites(sparsify(PLAIN), before, after, X, Q, K, sites=2)


def test_what_a_view_shows_is_not_shared_past_a_write_to_its_base(assert_rewrites):
    def before(x, q, k):
        base = x + 1
        rows = base.view(-1, 16)
        q = linear(rows, q)
        base.add_(1)
        return q, linear(rows, k)

    def after(x, q, k):
        base = x + 1
        rows = base.view(-1, 16)
        q = linear(nm_select(rows, None, 2, 4), q)
        base.add_(1)
        return q, linear(nm_select(rows, None, 2, 4), k)

    assert_rewrites(sparsify(PLAIN), before, after, X, Q, K, sites=2)


NO_WRITES = {
    "another tensor": lambda x, y: y.add_(1),
    "out= another tensor": lambda x, y: torch.mul(x, 2, out=y),
    "a copy": lambda x, y: x.clone().add_(1),
    "a part of a copy": lambda x, y: set_first((x * 2)[0]),
    "no write": lambda x, y: relu(x, inplace=False),
    "no write by position": lambda x, y: dropout(x, 0.5, False, False),
    "nothing to cast": lambda x, y: x.contiguous().float(),
    "a dunder": lambda x, y: x.__add__(1),
}


@pytest.mark.parametrize("between", NO_WRITES.values(), ids=NO_WRITES.keys())
def test_a_write_elsewhere_does_not_hinder_sharing(assert_rewrites, between):
    def before(x, y, q, k):
        x, y = x + 1, y + 1
        q = linear(x, q)
        other = between(x, y)
        return q, linear(x, k), other

    def after(x, y, q, k):
        x, y = x + 1, y + 1
        s = nm_select(x, None, 2, 4)
        q = linear(s, q)
        other = between(x, y)
        return q, linear(s, k), other

    assert_rewrites(sparsify(PLAIN), before, after, X, Y, Q, K, sites=2)
