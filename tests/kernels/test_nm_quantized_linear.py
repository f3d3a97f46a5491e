"""The quantised projection of what ``nm_select`` keeps, and how it chooses its kernel on CUDA.

On a machine without a GPU the kernels are references; those tests are about the choice.
"""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS

from amber_compile.errors import OptionError
from amber_compile.kernels import nm_quantize, quantize_rows, quantized_linear
from amber_compile.kernels.codes import CODES
from amber_compile.kernels.nm_quantized_linear import (
    _nm_quantized_linear_cuda,
    nm_quantized_linear,
)
from amber_compile.kernels.prepared_weight import prepare_weight

LINEAR = sys.modules["amber_compile.kernels.nm_linear"]
MODULE = sys.modules["amber_compile.kernels.nm_quantized_linear"]
K, N = 128, 24
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, K, generator=GENERATOR).bfloat16()
FACTOR = torch.rand(K, generator=GENERATOR) + 0.5
SMOOTH = torch.rand(K, generator=GENERATOR) + 0.5
BIAS = torch.randn(N, generator=GENERATOR)
DTYPES = ["int8", "fp8"]
WEIGHTS = {d: quantize_rows(torch.randn(N, K, generator=GENERATOR), None, d) for d in DTYPES}


def arguments(dtype, x=X, factor=FACTOR, smooth=SMOOTH, bias=BIAS):
    return (x, factor, smooth, *WEIGHTS[dtype], bias)


def dense(dtype, x, selection=(2, 4), bias=BIAS, result=torch.bfloat16, rest=()):
    """Return the product of dense codes."""
    codes, scale = nm_quantize(x, FACTOR, SMOOTH, *selection, dtype, *rest)
    weight, weight_scale = WEIGHTS[dtype]
    return quantized_linear(codes, scale, prepare_weight(weight), weight_scale, bias, result)


@pytest.fixture
def sparse_calls(monkeypatch):
    """A sparse unit for every projection of at least 8 tokens; the list of what it multiplied."""
    calls = []

    def multiply(values, *rest):
        calls.append(tuple(values.shape))
        return torch.ops.amber.nm_matmul(values, *rest)

    monkeypatch.setattr(LINEAR, "why_masked", lambda *_: None)
    monkeypatch.setattr(LINEAR, "_crossover", lambda *_: 8)
    monkeypatch.setattr(MODULE, "nm_matmul", multiply)
    return calls


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """A product takes the codes of a weight as they are, as on CUDA."""

    def multiply(codes, row_scale, weight, *rest):
        return quantized_linear(codes, row_scale, prepare_weight(weight), *rest)

    monkeypatch.setattr(MODULE, "quantized_linear", multiply)
    monkeypatch.setattr(MODULE, "prepare_weight", lambda weight: weight)


# ---- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, BIAS, BIAS.double(), BIAS.half()])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("rest", [(None, 0, 0), ("norm", 1, 0), ("variance", 0, 99)])
def test_quantises_then_multiplies(assert_same_bits, dtype, bias, out_dtype, rest):
    y = nm_quantized_linear(*arguments(dtype, bias=bias), 2, 4, dtype, *rest, out_dtype)
    assert_same_bits(y, dense(dtype, X, (2, 4), bias, out_dtype or torch.bfloat16, rest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_selecting_all_is_the_dense_quantised_projection(assert_same_bits, dtype):
    codes, scale = quantize_rows(X, SMOOTH, dtype)
    weight, weight_scale = WEIGHTS[dtype]
    expected = quantized_linear(codes, scale, prepare_weight(weight), weight_scale, BIAS, X.dtype)
    assert_same_bits(nm_quantized_linear(*arguments(dtype), 4, 4, dtype), expected)
    assert (nm_quantized_linear(*arguments(dtype), 2, 4, dtype) != expected).any()


# ---- the choice on CUDA --------------------------------------------------------------------------


def near(y, expected, dtype, x):
    """Whether two orders of fp32 sums and of energies explain the difference.

    The results have one rounding to bf16 each, of 2^-9; sums of K terms, scales and a correction of
    K squares are within 2 (K + 16) roundings of 2^-24 of the terms' size.
    """
    weight, weight_scale = WEIGHTS[dtype]
    size = (x.float() * SMOOTH).abs() @ (weight.float() * weight_scale[:, None]).abs().T
    budget = 2**-8 * (expected.abs() + y.abs()) + 2 * (K + 16) * 2**-24 * 4 * (size + BIAS.abs())
    return ((y.float() - expected.float()).abs() <= budget).all()


@pytest.mark.parametrize("correction", [None, "norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [X, X.transpose(0, 1), X[0], X.half()])
def test_many_tokens_are_compressed_and_multiplied(
    assert_same_bits, sparse_calls, correction, dtype, x
):
    y = _nm_quantized_linear_cuda(*arguments(dtype, x), 2, 4, dtype, correction)
    assert sparse_calls == [(x.shape[:-1].numel(), K // 2)]
    expected = dense(dtype, x, result=x.dtype, rest=(correction,))
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    if dtype == "int8" and correction is None:  # sums of whole numbers are exact
        assert_same_bits(y, expected)
    assert near(y, expected, dtype, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "least"), [(7, 0), (12, 13), (0, 0)])
def test_few_tokens_are_dense_codes(assert_same_bits, sparse_calls, dtype, tokens, least):
    x = X[0, :tokens]
    y = _nm_quantized_linear_cuda(*arguments(dtype, x), 2, 4, dtype, "norm", 0, least)
    assert sparse_calls == []
    assert_same_bits(y, dense(dtype, x, rest=("norm", 0, least)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_than_min_tokens_keep_all_channels(assert_same_bits, sparse_calls, dtype):
    y = _nm_quantized_linear_cuda(*arguments(dtype), 2, 4, dtype, None, 0, 41)
    assert sparse_calls == []
    assert_same_bits(y, dense(dtype, X, (4, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_prefix_keeps_all_channels(assert_same_bits, sparse_calls, dtype):
    y = _nm_quantized_linear_cuda(*arguments(dtype), 2, 4, dtype, "norm", 3)
    assert sparse_calls == [(40, K // 2)]
    assert_same_bits(y[:, :3], dense(dtype, X[:, :3], (4, 4)))
    plain = _nm_quantized_linear_cuda(*arguments(dtype), 2, 4, dtype, "norm")
    assert_same_bits(y[:, 3:], plain[:, 3:])
    assert (y[:, :3] != plain[:, :3]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [(8, 16), (4, 4)])
def test_what_no_sparse_unit_takes_is_dense_codes(assert_same_bits, monkeypatch, dtype, pattern):
    monkeypatch.setattr(MODULE, "nm_compress", None)
    y = _nm_quantized_linear_cuda(*arguments(dtype), *pattern, dtype, "norm")
    assert_same_bits(y, dense(dtype, X, pattern, rest=("norm",)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_off_its_boundary_is_dense_codes(assert_same_bits, sparse_calls, dtype):
    weight, weight_scale = WEIGHTS[dtype]
    moved = torch.empty(N * K + 1, dtype=torch.int8)[1:].view(N, K)
    moved.copy_(weight.view(torch.int8))
    moved = moved.view(CODES[dtype])
    y = _nm_quantized_linear_cuda(X, FACTOR, SMOOTH, moved, weight_scale, BIAS, 2, 4, dtype)
    assert sparse_calls == []
    assert_same_bits(y, dense(dtype, X))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_has_no_result(sparse_calls, dtype):
    x = X.clone()
    x[1, 4, 7] = float("nan")
    y = _nm_quantized_linear_cuda(*arguments(dtype, x), 2, 4, dtype, "norm")
    assert sparse_calls
    assert y.isnan().any(-1).nonzero().tolist() == [[1, 4]]
    assert y[1, 4].isnan().all()


# ---- PyTorch -------------------------------------------------------------------------------------

W8, W_SCALE = WEIGHTS["int8"]
BAD_ARGUMENTS = {
    r"weight is torch.int8 \[24, 64\]; valid: torch.int8 \[N, 128\]": (W8[:, :64], W_SCALE, BIAS),
    r"weight is torch.bfloat16 .*; valid: torch.int8": (W8.bfloat16(), W_SCALE, BIAS),
    r"weight_scale has shape \[23\]; valid: \[24\]": (W8, W_SCALE[1:], BIAS),
    "weight_scale has dtype torch.float16; valid: torch.float32": (W8, W_SCALE.half(), BIAS),
    r"bias has shape \[23\]; valid: \[24\]": (W8, W_SCALE, BIAS[1:]),
    "bias has dtype torch.int32; valid: a floating one": (W8, W_SCALE, BIAS.int()),
    "weight is on meta; valid: the device of x, cpu": (W8.to("meta"), W_SCALE, BIAS),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_weights_are_named(message):
    with pytest.raises(OptionError, match=message):
        nm_quantized_linear(X, None, None, *BAD_ARGUMENTS[message], 2, 4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x has 126 channels", lambda *w: nm_quantized_linear(X[..., 2:], None, None, *w, 2, 4)),
        ("unknown dtype 'int4'", lambda *w: nm_quantized_linear(X, None, None, *w, 2, 4, "int4")),
        (
            r"smooth has shape \[64\]",
            lambda *w: nm_quantized_linear(X, None, SMOOTH[:64], *w, 2, 4),
        ),
        (
            "out_dtype=torch.float64; valid: torch.bfloat16",
            lambda *w: nm_quantized_linear(X.double(), None, None, *w, 2, 4),
        ),
        (
            "out_dtype=torch.int8",
            lambda *w: nm_quantized_linear(X, None, None, *w, 2, 4, "int8", None, 0, 0, torch.int8),
        ),
    ],
)
def test_bad_arguments_are_named(message, call):
    with pytest.raises(OptionError, match=message):
        call(W8, W_SCALE, BIAS)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(OptionError, match=message):
        call(W8, W_SCALE, BIAS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_opcheck(dtype, out_dtype):
    for x in (X, X.transpose(0, 1), X[0, 0], X[:0]):
        rest = (2, 4, dtype, "norm", 1, 0, out_dtype)
        checks = DEFAULT_TEST_UTILS if dtype == "int8" else DEFAULT_TEST_UTILS[1:]  # not its schema
        torch.library.opcheck(nm_quantized_linear, (*arguments(dtype, x), *rest), test_utils=checks)


def test_a_gradient_is_refused():
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="amber::nm_quantized_linear is for inference only"):
        nm_quantized_linear(*arguments("int8", x), 2, 4).sum().backward()


@torch.no_grad()
def test_one_graph_serves_all_token_counts():
    torch.compiler.reset()

    def model(x):
        return nm_quantized_linear(*arguments("int8", x), 2, 4, "int8", None, 0, 8)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    try:
        for tokens in (3, 9, 40):
            x = torch.randn(tokens, K).bfloat16()
            assert torch.equal(compiled(x), model(x))
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
