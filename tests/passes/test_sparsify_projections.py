"""Sparsify what enters a projection: programs before and after.

Factors come after the inputs of ``after``, in the order in which the pass appends them.
"""

import operator

import pytest
import torch
from programs import KN, NORM, PLAIN, PREFIX, SQUARE, B, K, Q, W, X, rewrite_all, sparsify
from torch.nn.functional import linear

from amber_compile import Pattern, Settings
from amber_compile.derivations import Matrix, ScoreFactor
from amber_compile.kernels import nm_select

# ---- one projection ----


def test_a_selection_enters_a_projection(assert_rewrites):
    def before(x, w, b):
        return linear(x, w, b)

    def after(x, w, b):
        return linear(nm_select(x, None, 2, 4), w, b)

    assert_rewrites(sparsify(PLAIN), before, after, X, W, B, sites=1)


def test_everything_in_the_settings_reaches_the_operator(assert_rewrites):
    settings = Settings(Pattern(8, 16), "magnitude", "variance", dense_prefix=3)

    def before(x, w):
        return linear(x, w)

    def after(x, w):
        return linear(nm_select(x, None, 8, 16, "variance", 3, 32), w)

    assert_rewrites(sparsify(settings, min_rows=[32]), before, after, X, W, sites=1)


@pytest.mark.parametrize("score", ["weight_norm", "robust_norm"])
def test_a_factor_becomes_an_input(assert_rewrites, score):
    def before(x, w):
        return linear(x, w)

    def after(x, w, factor):
        return linear(nm_select(x, factor, 2, 4), w)

    settings = Settings(Pattern(2, 4), score)
    done = assert_rewrites(sparsify(settings), before, after, X, W, sites=1)
    (factor,) = done.inputs.requests
    assert factor.request == ScoreFactor(score)


def test_a_dense_graph_is_left_alone(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    done = assert_rewrites(sparsify("k_proj stays dense"), before, before, X, W, sites=0)
    assert done.inputs.requests == []


def test_a_dense_neighbour_reads_the_input_itself(assert_rewrites):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k):
        return linear(x, q), linear(nm_select(x, None, 2, 4), k)

    assert_rewrites(sparsify("dense", PLAIN), before, after, X, Q, K, sites=1)


def test_symbolic_sizes_stay_symbolic(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w, factor):
        return linear(nm_select(x, factor, 2, 4, min_tokens=64), w)

    done = assert_rewrites(
        sparsify(NORM, min_rows=[64]), before, after, X, W, sites=1, dynamic=True
    )
    ((_, selection),) = done.sites
    assert [type(size) for size in selection.meta["example_value"].shape[:2]] == [torch.SymInt] * 2


# ---- spellings ----


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.matmul(x, w),
        lambda x, w: x.matmul(w),
        lambda x, w: operator.matmul(x, w),
    ],
)
def test_a_weight_stored_transposed_has_its_own_factor(assert_rewrites, product):
    def after(x, w, factor):
        return product(nm_select(x, factor, 2, 4), w)

    done = assert_rewrites(sparsify(NORM), product, after, X, KN, sites=1)
    assert [one.request for one in done.inputs.requests] == [
        ScoreFactor("weight_norm", Matrix(True))
    ]


@pytest.mark.parametrize(
    "transposed", [lambda w: w.T, lambda w: w.t(), lambda w: w.transpose(0, 1), lambda w: w.mT]
)
def test_a_weight_transposed_on_the_way_is_a_linear(assert_rewrites, transposed):
    def before(x, w):
        return x @ transposed(w)

    def after(x, w, factor):
        turned = transposed(w)
        return nm_select(x, factor, 2, 4) @ turned

    done = assert_rewrites(sparsify(NORM), before, after, X, W, sites=1)
    (factor,) = done.inputs.requests
    assert factor.request == ScoreFactor("weight_norm")


def test_only_the_activation_of_an_addmm_is_selected(assert_rewrites):
    def before(x, w, b):
        return torch.addmm(b, x.view(-1, 16), w)

    def after(x, w, b):
        rows = x.view(-1, 16)
        return torch.addmm(b, nm_select(rows, None, 2, 4), w)

    assert_rewrites(sparsify(PLAIN), before, after, X, KN, B, sites=1)


def test_keyword_arguments_are_found(assert_rewrites):
    def before(x, w, b):
        return linear(input=x, weight=w, bias=b)

    def after(x, w, b):
        return linear(input=nm_select(x, None, 2, 4), weight=w, bias=b)

    assert_rewrites(sparsify(PLAIN), before, after, X, W, B, sites=1)


# ---- dense prefix ----


def test_a_dense_prefix_needs_the_sequence_dimension(assert_rewrites):
    def before(x, w):
        h = x + 1
        return linear(h.view(-1, 16), w).view(2, 4, 8)

    def after(x, w):
        h = x + 1
        rows = h.view(-1, 16)
        s = nm_select(rows.view_as(h), None, 2, 4, dense_prefix=1)
        return linear(s.view_as(rows), w).view(2, 4, 8)

    assert_rewrites(sparsify(PREFIX), before, after, X, W, sites=1)


def test_a_dense_prefix_of_an_input_with_its_sequence_needs_no_view(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w):
        return linear(nm_select(x, None, 2, 4, dense_prefix=1), w)

    assert_rewrites(sparsify(PREFIX), before, after, X, W, sites=1)


def test_without_a_prefix_flat_rows_are_selected_as_they_are(assert_rewrites):
    def before(x, w):
        return linear(x.view(-1, 16), w)

    def after(x, w):
        return linear(nm_select(x.view(-1, 16), None, 2, 4), w)

    assert_rewrites(sparsify(PLAIN), before, after, X, W, sites=1)


def test_flattening_by_symbolic_sizes_keeps_them(assert_rewrites):
    def before(x, w):
        return linear(x.view(x.shape[0] * x.shape[1], 16), w)

    def after(x, w):
        rows = x.view(x.shape[0] * x.shape[1], 16)
        s = nm_select(rows.view_as(x), None, 2, 4, dense_prefix=1)
        return linear(s.view_as(rows), w)

    assert_rewrites(sparsify(PREFIX), before, after, X, W, sites=1, dynamic=True)


def test_flat_rows_share_a_selection_with_a_prefix(assert_rewrites):
    def before(x, q, k):
        rows = x.view(-1, 16)
        return linear(rows, q), linear(rows, k)

    def after(x, q, k):
        rows = x.view(-1, 16)
        s = nm_select(rows.view_as(x), None, 2, 4, dense_prefix=1).view_as(rows)
        return linear(s, q), linear(s, k)

    assert_rewrites(sparsify(PREFIX), before, after, X, Q, K, sites=2)


# ---- autocast ----


def test_autocast_casts_what_was_selected(assert_rewrites):
    def before(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, w)

    def after(x, w, factor):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(nm_select(x, factor, 2, 4), w)

    assert_rewrites(sparsify(NORM), before, after, X, W, sites=1)


# ---- again ----


def test_a_rewritten_graph_is_not_rewritten_again(assert_rewrites):
    def once(x, w, k):
        h = x + 1
        rows = h.view(-1, 16)
        s = nm_select(rows.view_as(h), None, 2, 4, dense_prefix=1)
        return linear(s.view_as(rows), w), linear(nm_select(x, None, 2, 4), k)

    assert_rewrites(rewrite_all(PLAIN), once, once, X, W, K, sites=0)


def test_what_follows_a_selected_projection_is_still_selected(assert_rewrites):
    def before(x, w):
        return linear(linear(nm_select(x, None, 2, 4), w), w)

    def after(x, w):
        y = linear(nm_select(x, None, 2, 4), w)
        return linear(nm_select(y, None, 2, 4), w)

    assert_rewrites(rewrite_all(PLAIN), before, after, X, SQUARE, sites=1)
