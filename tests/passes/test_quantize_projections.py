"""Quantise projections: programs before and after."""

import pytest
import torch
from programs import KN, B, K, Q, W, X, silu_and_multiply
from torch import nn
from torch.nn.functional import linear

from amber_compile import Pattern, Settings
from amber_compile.decision import Decision, dense, sparse
from amber_compile.kernels import nm_quantize, nm_select, quantize_rows, quantized_linear
from amber_compile.passes import (
    find_projections,
    fuse_selections,
    quantize_projections,
    sparsify_projections,
)
from amber_compile.passes.quantize_projections import products_of
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization

PLAIN = Settings(Pattern(2, 4), "magnitude")
INT8 = Quantization("int8")
FP32 = torch.float32
SMOOTH = torch.rand(16) + 0.5
ALPHA, BETA, UPDATED = torch.rand(8) + 0.5, torch.randn(8), torch.randn(8, 16)


def quantize(*decisions: Decision, fuse: bool = False, tensors=None):
    """Return the pass under which projection ``i`` gets ``decisions[i]``, or the only one."""

    def run(gm):
        found = find_projections(gm)
        chosen = decisions * len(found) if len(decisions) == 1 else decisions
        decided = list(zip(found, chosen, strict=True))
        held = PlanTensors({one.name: own for one, own in zip(found, tensors or (), strict=False)})
        same = lambda name, a, b: torch.equal(held.get(a, name), held.get(b, name))  # noqa: E731
        done = sparsify_projections(gm, decided, tensors=held)
        products = products_of(decided, done.halves)
        quantize_projections(gm, products, done.inputs, held, same)
        if fuse:
            fuse_selections(gm)
        return done

    return run


def w8a8(dtype: str = "int8", smooth: str | None = None) -> Decision:
    return Decision(reason="k_proj stays dense", quantization=Quantization(dtype, smooth))


def sparse_w8a8(**settings) -> Decision:
    chosen = Settings(Pattern(2, 4), **{"score": "magnitude", **settings})
    return Decision(settings=chosen, quantization=INT8)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_dense_projection(assert_rewrites, dtype):
    def before(x, w, b):
        return linear(x, w, b)

    def after(x, w, b, codes, scale):
        rows, row_scale = quantize_rows(x, None, dtype)
        return quantized_linear(rows, row_scale, codes, scale, b, FP32)

    assert_rewrites(quantize(w8a8(dtype)), before, after, X, W, B, sites=0)


def test_a_sparse_projection_quantises_what_was_kept(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w, codes, scale):
        rows, row_scale = quantize_rows(nm_select(x, None, 2, 4), None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    assert_rewrites(quantize(sparse_w8a8()), before, after, X, W, sites=1)


def test_selection_and_quantisation_become_one(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w, codes, scale):
        rows, row_scale = nm_quantize(x, None, None, 2, 4, "int8", "norm", 1)
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    decision = sparse_w8a8(correction="norm", dense_prefix=1)
    assert_rewrites(quantize(decision, fuse=True), before, after, X, W, sites=1)


def test_a_plain_quantisation_is_not_fused(assert_rewrites):
    def before(x, w):
        return linear(x.relu(), w)

    def after(x, w, codes, scale):
        rows, row_scale = quantize_rows(x.relu(), None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    assert_rewrites(quantize(w8a8(), fuse=True), before, after, X, W, sites=0)


def test_projections_of_one_input_share_its_codes(assert_rewrites):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k, q8, q_scale, k8, k_scale):
        rows, row_scale = quantize_rows(x, None, "int8")
        a = quantized_linear(rows, row_scale, q8, q_scale, None, FP32)
        return a, quantized_linear(rows, row_scale, k8, k_scale, None, FP32)

    assert_rewrites(quantize(w8a8()), before, after, X, Q, K, sites=0)


def test_formats_do_not_share(assert_rewrites):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k, q8, q_scale, k8, k_scale):
        rows, row_scale = quantize_rows(x, None, "int8")
        a = quantized_linear(rows, row_scale, q8, q_scale, None, FP32)
        rows, row_scale = quantize_rows(x, None, "fp8")
        return a, quantized_linear(rows, row_scale, k8, k_scale, None, FP32)

    assert_rewrites(quantize(w8a8(), w8a8("fp8")), before, after, X, Q, K, sites=0)


def test_an_input_that_is_written_to_is_quantised_again(assert_rewrites):
    def before(x, q, k):
        x = x.relu()
        a = linear(x, q)
        x.add_(1)
        return a, linear(x, k)

    def after(x, q, k, q8, q_scale, k8, k_scale):
        x = x.relu()
        rows, row_scale = quantize_rows(x, None, "int8")
        a = quantized_linear(rows, row_scale, q8, q_scale, None, FP32)
        x.add_(1)
        rows, row_scale = quantize_rows(x, None, "int8")
        return a, quantized_linear(rows, row_scale, k8, k_scale, None, FP32)

    assert_rewrites(quantize(w8a8()), before, after, X, Q, K, sites=0)


def test_a_projection_in_16_bit_is_left_alone(assert_rewrites):
    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def after(x, q, k, k8, k_scale):
        a = linear(nm_select(x, None, 2, 4), q)
        rows, row_scale = quantize_rows(x, None, "int8")
        return a, quantized_linear(rows, row_scale, k8, k_scale, None, FP32)

    assert_rewrites(quantize(sparse(PLAIN), w8a8()), before, after, X, Q, K, sites=1)


def test_nothing_to_do(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    assert_rewrites(quantize(dense("lm_head")), before, before, X, W, sites=0)


def test_an_addmm_has_its_weight_transposed(assert_rewrites):
    x = X[0]

    def before(x, w, b):
        return torch.addmm(b, x, w)

    def after(x, w, b, codes, scale):
        rows, row_scale = quantize_rows(x, None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, b, FP32)

    assert_rewrites(quantize(w8a8()), before, after, x, KN, B, sites=0)


def test_the_result_has_the_type_of_the_product(assert_rewrites):
    x, w = X.bfloat16(), nn.Parameter(W.detach().bfloat16())

    def before(x, w):
        return linear(x, w)

    def after(x, w, codes, scale):
        rows, row_scale = quantize_rows(x, None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, torch.bfloat16)

    assert_rewrites(quantize(w8a8()), before, after, x, w, sites=0)


def test_both_halves_of_a_gate_and_up_projection(assert_rewrites):
    def before(x, w):
        return silu_and_multiply(linear(x, w))

    def after(x, w, gate8, gate_scale, up8, up_scale):
        rows, row_scale = quantize_rows(nm_select(x, None, 2, 4), None, "int8")
        gate = quantized_linear(rows, row_scale, gate8, gate_scale, None, FP32)
        rows, row_scale = quantize_rows(x, None, "int8")
        up = quantized_linear(rows, row_scale, up8, up_scale, None, FP32)
        return nn.functional.silu(gate) * up

    assert_rewrites(quantize(sparse_w8a8(part="gate")), before, after, X, W, sites=1)


# ---- what the plan has ----


def test_a_smooth_vector_enters_the_quantisation(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w, smooth, codes, scale):
        rows, row_scale = quantize_rows(x, smooth, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    rewrite = quantize(w8a8(smooth="outstanding"), tensors=[{"smooth": SMOOTH}])
    assert_rewrites(rewrite, before, after, X, W, sites=0)


@pytest.mark.parametrize("equal", [True, False])
def test_codes_are_shared_if_the_smooth_vectors_are_equal(assert_rewrites, equal):
    vectors = [{"smooth": SMOOTH}, {"smooth": SMOOTH.clone() if equal else SMOOTH + 1}]

    def before(x, q, k):
        return linear(x, q), linear(x, k)

    def shared(x, q, k, smooth, q8, q_scale, k8, k_scale):
        rows, row_scale = quantize_rows(x, smooth, "int8")
        a = quantized_linear(rows, row_scale, q8, q_scale, None, FP32)
        return a, quantized_linear(rows, row_scale, k8, k_scale, None, FP32)

    def apart(x, q, k, one, q8, q_scale, other, k8, k_scale):
        rows, row_scale = quantize_rows(x, one, "int8")
        a = quantized_linear(rows, row_scale, q8, q_scale, None, FP32)
        rows, row_scale = quantize_rows(x, other, "int8")
        return a, quantized_linear(rows, row_scale, k8, k_scale, None, FP32)

    rewrite = quantize(w8a8(smooth="outstanding"), tensors=vectors)
    assert_rewrites(rewrite, before, shared if equal else apart, X, Q, K, sites=0)


def test_output_scale_and_bias_are_those_of_the_product(assert_rewrites):
    held = {"output_scale": ALPHA, "output_bias": BETA}

    def before(x, w):
        return linear(x, w)

    def after(x, w, beta, codes, scale):
        rows, row_scale = quantize_rows(nm_select(x, None, 2, 4), None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, beta, FP32)

    decision = sparse_w8a8(output_scale=True, output_bias=True)
    done = assert_rewrites(quantize(decision, tensors=[held]), before, after, X, W, sites=1)
    plain = quantize(sparse_w8a8())
    without = assert_rewrites(plain, *_plain_programs(), X, W, sites=1)
    scale, plain_scale = (found.inputs.requests[-1].request for found in (done, without))
    torch.testing.assert_close(scale.compute(W), plain_scale.compute(W) * ALPHA)


def test_a_projection_with_a_bias_is_corrected_behind_it(assert_rewrites):
    def before(x, w, b):
        return linear(x, w, b)

    def after(x, w, b, alpha, codes, scale):
        rows, row_scale = quantize_rows(nm_select(x, None, 2, 4), None, "int8")
        return (quantized_linear(rows, row_scale, codes, scale, b, FP32) * alpha).to(FP32)

    rewrite = quantize(sparse_w8a8(output_scale=True), tensors=[{"output_scale": ALPHA}])
    assert_rewrites(rewrite, before, after, X, W, B, sites=1)


def test_an_updated_weight_is_what_is_quantised(assert_rewrites):
    before, after = _plain_programs()
    rewrite = quantize(sparse_w8a8(updated_weight=True), tensors=[{"weight": UPDATED}])
    done = assert_rewrites(rewrite, before, after, X, W, sites=1)
    codes = done.inputs.requests[0].request
    assert torch.equal(codes.compute(W), codes.compute(UPDATED))
    assert not torch.equal(W, UPDATED)


def _plain_programs():
    def before(x, w):
        return linear(x, w)

    def after(x, w, codes, scale):
        rows, row_scale = quantize_rows(nm_select(x, None, 2, 4), None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    return before, after
