"""How a projection chooses its kernel on CUDA, on a machine without: the kernels are references."""

import sys

import pytest
import torch

from amber_compile.kernels import nm_linear, nm_select
from amber_compile.kernels.nm_linear import _nm_linear_cuda, kernel_of, why_masked

MODULE = sys.modules["amber_compile.kernels.nm_linear"]
K, N = 128, 24
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, K, generator=GENERATOR).bfloat16()
WEIGHT = torch.randn(N, K, generator=GENERATOR).bfloat16()
BIAS = torch.randn(N, generator=GENERATOR).bfloat16()
FACTOR = torch.rand(K, generator=GENERATOR) + 0.5
ALPHA = torch.rand(N, generator=GENERATOR) + 0.5
BETA = torch.randn(N, generator=GENERATOR)


@pytest.fixture
def sparse_calls(monkeypatch):
    """A sparse unit for every projection of at least 8 tokens; the list of what it multiplied."""
    calls = []

    def multiply(values, *rest):
        calls.append(tuple(values.shape))
        return torch.ops.amber.nm_matmul(values, *rest)

    monkeypatch.setattr(MODULE, "why_masked", lambda *_: None)
    monkeypatch.setattr(MODULE, "_crossover", lambda *_: 8)
    monkeypatch.setattr(MODULE, "nm_matmul", multiply)
    return calls


def exact(x, correction, bias):
    """Return the projection in fp64 and what rounding may add to it.

    2^-8 relative for each rounding to bf16, of the corrected activation (the masked way) and of the
    result; the sums are in fp32, K terms of 2^-24 each.
    """
    kept = nm_select(x, FACTOR, 2, 4).double()
    if correction:
        energy = (x.double() ** 2).mean(-1, keepdim=True)
        kept = kept * (energy / (kept**2).mean(-1, keepdim=True)).sqrt()
    y = kept @ WEIGHT.double().T + (0 if bias is None else bias.double())
    size = kept.abs() @ WEIGHT.double().abs().T + (0 if bias is None else bias.double().abs())
    return y, 2**-8 * (size + y.abs()) + K * 2**-24 * size


@pytest.mark.parametrize("correction", [None, "norm"])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("x", [X, X.transpose(0, 1), X[0]])
def test_many_tokens_are_compressed_and_multiplied(sparse_calls, correction, bias, x):
    y = _nm_linear_cuda(x, WEIGHT, bias, FACTOR, 2, 4, correction)
    assert sparse_calls == [(x.shape[:-1].numel(), K // 2)]
    assert y.dtype == x.dtype
    expected, budget = exact(x, correction, bias)
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= budget).all()
    masked = nm_linear(x, WEIGHT, bias, FACTOR, 2, 4, correction)
    assert ((masked.double() - expected).abs() <= budget).all()


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize(("alpha", "beta"), [(ALPHA, None), (None, BETA), (ALPHA, BETA)])
def test_outputs_are_corrected_in_the_epilogue(monkeypatch, sparse_calls, bias, alpha, beta):
    """One rounding; the masked way has three, so its budget is wider."""
    y = _nm_linear_cuda(X, WEIGHT, bias, FACTOR, 2, 4, "norm", 0, 0, alpha, beta)
    assert sparse_calls == [(40, K // 2)]
    monkeypatch.setattr(MODULE, "_corrected", None)  # nothing is left to do behind the product
    assert torch.equal(y, _nm_linear_cuda(X, WEIGHT, bias, FACTOR, 2, 4, "norm", 0, 0, alpha, beta))
    exact_y, budget = exact(X, "norm", bias)
    scale = 1.0 if alpha is None else alpha.double()
    expected = exact_y * scale + (0.0 if beta is None else beta.double())
    fp32 = 4 * 2**-24 * (expected.abs() + 2 * (0.0 if beta is None else beta.double().abs()))
    sums = (budget - 2**-8 * exact_y.abs()) * scale  # of fp32, and of the corrected activation
    assert ((y.double() - expected).abs() <= sums + fp32 + 2**-8 * expected.abs()).all()


def test_the_dense_prefix_is_corrected_too(assert_same_bits, sparse_calls):
    y = _nm_linear_cuda(X, WEIGHT, BIAS, FACTOR, 2, 4, None, 3, 0, ALPHA, BETA)
    dense = torch.nn.functional.linear(X[:, :3], WEIGHT, BIAS).float()
    assert_same_bits(y[:, :3], (dense * ALPHA + BETA).bfloat16())


def test_few_tokens_are_corrected_behind_the_product(assert_same_bits, sparse_calls):
    arguments = (X[0, :7], WEIGHT, BIAS, FACTOR, 2, 4, None, 0, 0, ALPHA, BETA)
    assert_same_bits(_nm_linear_cuda(*arguments), nm_linear(*arguments))
    assert sparse_calls == []


@pytest.mark.parametrize(("tokens", "least"), [(7, 0), (12, 13), (0, 0)])
def test_few_tokens_are_masked(assert_same_bits, sparse_calls, tokens, least):
    x = X[0, :tokens]
    y = _nm_linear_cuda(x, WEIGHT, BIAS, FACTOR, 2, 4, "norm", 0, least)
    assert sparse_calls == []
    assert_same_bits(y, nm_linear(x, WEIGHT, BIAS, FACTOR, 2, 4, "norm", 0, least))


def test_fewer_than_min_tokens_stay_dense(assert_same_bits, sparse_calls):
    y = _nm_linear_cuda(X, WEIGHT, BIAS, FACTOR, 2, 4, None, 0, 41)
    assert sparse_calls == []
    assert_same_bits(y, torch.nn.functional.linear(X, WEIGHT, BIAS))


def test_the_dense_prefix_of_every_sequence_is_dense(assert_same_bits, sparse_calls):
    y = _nm_linear_cuda(X, WEIGHT, BIAS, FACTOR, 2, 4, None, 3)
    dense = torch.nn.functional.linear(X[:, :3], WEIGHT, BIAS)
    assert_same_bits(y[:, :3], dense)
    assert_same_bits(y[:, 3:], _nm_linear_cuda(X, WEIGHT, BIAS, FACTOR, 2, 4)[:, 3:])


def test_what_no_sparse_unit_takes_is_masked(assert_same_bits, monkeypatch):
    monkeypatch.setattr(MODULE, "why_masked", lambda *_: "no sparse unit")
    monkeypatch.setattr(MODULE, "nm_compress", None)
    y = _nm_linear_cuda(X, WEIGHT, BIAS, FACTOR, 2, 4, "norm")
    assert_same_bits(y, nm_linear(X, WEIGHT, BIAS, FACTOR, 2, 4, "norm"))


def test_on_a_cpu_the_reason_is_the_device():
    assert why_masked(X, WEIGHT, 2, 4, None) == "no sparse unit on device 'cpu'"


def test_the_kernel_is_named_with_its_least_tokens(monkeypatch, sparse_calls):
    from amber_compile.kernels.cuda.device import WGMMA_SP

    monkeypatch.setattr(MODULE, "device_instruction", lambda device: WGMMA_SP)
    assert kernel_of(X, WEIGHT) == "nm_linear, wgmma.sp from 8 tokens"
    codes = WEIGHT.to(torch.int8)
    assert kernel_of(X, codes) == "nm_quantized_linear, wgmma.sp from 8 tokens"


def test_the_kind_is_that_of_the_weight(monkeypatch):
    """A fake CUDA tensor; the crossover of 8 bits is another than that of 16."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from amber_compile.kernels.cuda.device import assumed

    with FakeTensorMode(), assumed((8, 0)):
        x = torch.empty(4096, 2048, dtype=torch.bfloat16, device="cuda")
        for dtype, reason in (
            (torch.bfloat16, "[2048, 2048] is too small for a sparse product to pay"),
            (torch.int8, None),
            (torch.float8_e4m3fn, "mma.sp has no kernel for fp8"),
        ):
            weight = torch.empty(2048, 2048, dtype=dtype, device="cuda")
            assert why_masked(x, weight, 2, 4, "norm") == reason


def test_a_weight_off_its_boundary_is_masked(assert_same_bits, sparse_calls):
    storage = torch.empty(N * K + 1, dtype=torch.bfloat16)
    weight = storage[1:].view(N, K).copy_(WEIGHT)
    y = _nm_linear_cuda(X, weight, BIAS, FACTOR, 2, 4)
    assert sparse_calls == []
    assert_same_bits(y, nm_linear(X, weight, BIAS, FACTOR, 2, 4))
