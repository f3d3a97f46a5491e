"""Correct the outputs of sparse projections: programs before and after."""

from dataclasses import replace

import pytest
import torch
from programs import KN, B, W, X
from torch.nn.functional import linear

from amber_compile import Pattern, Settings
from amber_compile.decision import sparse
from amber_compile.kernels import nm_select
from amber_compile.passes import decide, find_projections, sparsify_projections
from amber_compile.passes.correct_outputs import why_not_corrected
from amber_compile.plan_tensors import PlanTensors

ALPHA, BETA, UPDATED = torch.rand(8) + 0.5, torch.randn(8), torch.randn(8, 16)
CALIBRATED = {
    "output_scale": ALPHA,
    "output_bias": BETA,
    "weight": UPDATED,
    "factor": torch.ones(16),
}


def corrected(**settings):
    """Return the pass that sparsifies every projection with such ``settings``."""
    chosen = Settings(Pattern(2, 4), **{"score": "magnitude", **settings})

    def run(gm):
        decided = [(one, sparse(chosen)) for one in find_projections(gm)]
        tensors = PlanTensors({one.name: CALIBRATED for one, _ in decided})
        return sparsify_projections(gm, decided, tensors=tensors)

    return run


def test_an_output_scale(assert_rewrites):
    def before(x, w):
        return linear(x, w).relu()

    def after(x, w, alpha):
        return (linear(nm_select(x, None, 2, 4), w) * alpha).to(torch.float32).relu()

    assert_rewrites(corrected(output_scale=True), before, after, X, W, sites=1)


def test_an_output_bias_comes_after_the_layers_own(assert_rewrites):
    def before(x, w, b):
        return linear(x, w, b)

    def after(x, w, b, beta):
        return (linear(nm_select(x, None, 2, 4), w, b) + beta).to(torch.float32)

    assert_rewrites(corrected(output_bias=True), before, after, X, W, B, sites=1)


def test_scale_before_bias_and_the_dtype_of_the_product(assert_rewrites):
    x, w = X.bfloat16(), torch.nn.Parameter(W.detach().bfloat16())

    def before(x, w):
        return linear(x, w)

    def after(x, w, alpha, beta):
        return (linear(nm_select(x, None, 2, 4), w) * alpha + beta).to(torch.bfloat16)

    assert_rewrites(corrected(output_scale=True, output_bias=True), before, after, x, w, sites=1)


def test_an_updated_weight_replaces_the_own_one(assert_rewrites):
    def before(x, w, b):
        return linear(x, w, b)

    def after(x, w, b, updated):
        return linear(nm_select(x, None, 2, 4), updated, b)

    assert_rewrites(corrected(updated_weight=True), before, after, X, W, B, sites=1)


def test_a_calibrated_factor_is_an_input(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w, factor):
        return linear(nm_select(x, factor, 2, 4), w)

    assert_rewrites(corrected(score="calibrated"), before, after, X, W, sites=1)


def test_without_corrections_nothing_is_added(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w):
        return linear(nm_select(x, None, 2, 4), w)

    done = assert_rewrites(corrected(), before, after, X, W, sites=1)
    assert done.inputs.requests == []


def test_an_addmm_keeps_its_weight(capture):
    gm, _ = capture(lambda x, w, b: torch.addmm(b, x, w), X[0], KN, B)
    (site,) = find_projections(gm)
    settings = Settings(Pattern(2, 4), "magnitude", updated_weight=True)
    reason = "updated_weight of a addmm; valid: linear"
    assert why_not_corrected(site, settings) == reason
    assert decide(site, "prefill", lambda _: settings).reason == reason
    assert why_not_corrected(site, Settings(output_scale=True)) is None


@pytest.mark.parametrize("flag", ["output_scale", "output_bias"])
def test_grouped_experts_have_no_epilogue(capture, flag):
    gm, _ = capture(lambda x, w: linear(x, w), X, W)
    (site,) = find_projections(gm)
    experts = replace(site, shape=(4, 8, 16))
    assert "grouped experts" in why_not_corrected(experts, Settings(**{flag: True}))
    assert why_not_corrected(experts, Settings()) is None
