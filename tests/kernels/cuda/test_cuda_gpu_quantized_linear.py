"""Quantised projections, and corrected outputs, on a GPU: both ways to multiply, and execution."""

from __future__ import annotations

import pytest
import torch
from gpu_problems import BF16, FP16, FP32, FP32_ROUNDING, amber
from torch import Tensor

from amber_compile.kernels.cuda.device import why_no_sparse_product
from amber_compile.kernels.nm_linear import is_sparse
from amber_compile.kernels.nm_quantized_linear import nm_quantized_linear_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DTYPES = ["int8", "fp8"]
OUTPUTS, CHANNELS = 264, 512
A_MOMENT = 50_000_000  # cycles that a stream is kept busy


def operands(dtype: str, tokens: int, of: torch.dtype = BF16, seed: int = 0) -> list[Tensor]:
    """Return x, factor, smooth, weight, weight_scale and bias on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, CHANNELS, generator=generator).to(of)
    weight = torch.randn(OUTPUTS, CHANNELS, generator=generator)
    factor, smooth = (torch.rand(CHANNELS, generator=generator) + 0.5 for _ in range(2))
    codes, scale = amber.quantize_rows(weight, None, dtype)
    return [x, factor, smooth, codes, scale, torch.randn(OUTPUTS, generator=generator)]


def exact(parts: list[Tensor], dtype: str, rest: tuple[object, ...]) -> Tensor:
    """Return the projection of the codes that the CPU makes, in fp64."""
    x, factor, smooth, weight, weight_scale, bias = parts
    codes, scale = amber.nm_quantize(x, factor, smooth, 2, 4, dtype, *rest)
    product = codes.double() @ weight.double().T
    return product * scale.double()[..., None] * weight_scale.double() + bias.double()


def assert_near(y: Tensor, parts: list[Tensor], dtype: str, rest: tuple[object, ...]) -> None:
    """Compare in the Frobenius norm, with what is rounded: sums, energies, and the result.

    int8 sums are exact. Those of e4m3 in the tensor cores are judged by PyTorch's product of codes,
    with the same instruction. A corrected scale errs by K roundings of fp32.
    """
    wanted = exact(parts, dtype, rest)
    rounding = torch.finfo(y.dtype).eps / 2 + (CHANNELS + 16) * FP32_ROUNDING
    budget = rounding * wanted.norm()
    if dtype == "fp8":
        low = nm_quantized_linear_reference(*(p.cuda() for p in parts), 2, 4, dtype, *rest, FP32)
        budget = budget + 2 * (low.cpu().double() - wanted).norm()
    assert (y.cpu().double() - wanted).norm() <= budget


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [BF16, FP16])
@pytest.mark.parametrize("tokens", [1, 77, 1024])
@pytest.mark.parametrize("rest", [(None, 0, 0), ("norm", 3, 0), ("norm", 0, 10000)])
def test_the_sparse_unit_answers_like_the_definition(
    device, sparse_from_one_token, dtype, of, tokens, rest
):
    parts = operands(dtype, tokens, of)
    y = amber.nm_quantized_linear(*(p.to(device) for p in parts), 2, 4, dtype, *rest)
    assert (y.shape, y.dtype) == ((2, tokens, OUTPUTS), of)
    assert_near(y, parts, dtype, rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 77, 1024])
@pytest.mark.parametrize("rest", [(None, 0, 0), ("norm", 3, 0), ("variance", 0, 0)])
def test_dense_codes_answer_like_the_definition(device, dtype, tokens, rest):
    """N = 264 is below every crossover, so cuBLAS multiplies."""
    parts = operands(dtype, tokens)
    moved = [p.to(device) for p in parts]
    assert not is_sparse(moved[0], moved[3], 2, 4, rest[0], 0)
    assert_near(amber.nm_quantized_linear(*moved, 2, 4, dtype, *rest), parts, dtype, rest)


def test_both_ways_of_int8_are_the_same(device, sparse_from_one_token, assert_same_bits):
    moved = [p.to(device) for p in operands("int8", 300)]
    if reason := why_no_sparse_product(device, "int8"):
        pytest.skip(reason)
    x, factor, smooth, *product = moved
    codes, scale = amber.nm_quantize(x, factor, smooth, 2, 4)
    dense = amber.quantized_linear(codes, scale, *product, BF16)
    assert_same_bits(amber.nm_quantized_linear(*moved, 2, 4), dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_are_the_kernels(device, dtype):
    """quantize_rows and nm_quantize through PyTorch: bit for bit what the CPU says."""
    x, factor, smooth, *_ = operands(dtype, 33)
    for arguments in (
        (x, None, 4, 4),
        (x, factor, 2, 4),
        (x, factor, 8, 16),
        (x[:, :0], None, 2, 4),
    ):
        rows, weights, n, m = arguments
        expected = amber.nm_quantize(rows, weights, smooth, n, m, dtype)
        moved = [None if t is None else t.to(device) for t in (rows, weights, smooth)]
        actual = amber.nm_quantize(*moved, n, m, dtype)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))
    for one, other in zip(
        amber.quantize_rows(x.to(device), smooth.to(device), dtype),
        amber.quantize_rows(x, smooth, dtype),
        strict=True,
    ):
        assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("of", [BF16, FP16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [5, 300])
def test_corrected_outputs(device, sparse_from_one_token, of, bias, tokens):
    """Twice the error of the masked way on the CPU, and the rounding of the result."""
    x, factor, _, _, alpha, beta = operands("int8", tokens, of)
    alpha = 0.5 + alpha / alpha.max()
    weight = torch.randn(OUTPUTS, CHANNELS, generator=torch.Generator().manual_seed(1)).to(of)
    shift = torch.randn(OUTPUTS).to(of) if bias else None
    rest = (2, 4, "norm", 0, 0)
    moved = [None if t is None else t.to(device) for t in (x, weight, shift, factor)]
    y = amber.nm_linear(*moved, *rest, alpha.to(device), beta.to(device)).cpu().double()
    wide = [None if t is None else t.double() for t in (x, weight, shift)]
    kept = amber.nm_select(x, factor, 2, 4).double()
    scale = (wide[0].square().mean(-1, keepdim=True) / kept.square().mean(-1, keepdim=True)).sqrt()
    linear = torch.nn.functional.linear(kept * scale, wide[1], wide[2])
    wanted = linear * alpha.double() + beta.double()
    low = amber.nm_linear(x, weight, shift, factor, *rest, alpha, beta).double()
    rounding = torch.finfo(of).eps / 2 * wanted.abs()
    assert ((y - wanted).abs() <= 2 * (low - wanted).abs().max() + rounding).all()


# ---- execution -----------------------------------------------------------------------------------


@pytest.fixture(params=[(d, n) for d in DTYPES for n in (2, 4)], ids=str)
def call(request, device, sparse_from_one_token):
    """A projection, sparse or dense, compiled and tested on the device already; and its input."""
    dtype, n = request.param
    x, *rest = (p.to(device) for p in operands(dtype, 300))

    def project(x: Tensor) -> Tensor:
        y: Tensor = amber.nm_quantized_linear(x, *rest, n, 4, dtype, "norm")
        return y

    project(x)
    torch.cuda.synchronize()
    return project, x


def test_a_captured_graph_answers_as_eager_does(call, assert_same_bits):
    project, x = call
    static, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = project(static)
    for seed in range(3):
        fresh = torch.randn_like(x) * (seed + 1)
        static.copy_(fresh)
        y.view(torch.uint8).fill_(255)
        graph.replay()
        assert_same_bits(y, project(fresh))


def test_work_is_ordered_by_the_current_stream(call, assert_same_bits):
    project, x = call
    expected = project(2 * x)
    late = torch.full_like(x, float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_MOMENT)
        late.copy_(2 * x)
        y = project(late)  # reads NaN if it does not wait for the stream
    side.synchronize()
    assert_same_bits(y, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_waits_for_the_device(call):
    project, x = call
    torch.cuda.set_sync_debug_mode("error")
    try:
        project(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
