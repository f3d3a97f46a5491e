"""Dense products of codes as a GPU computes them: on a CPU through the same PyTorch operators."""

import sys

import numpy as np
import pytest
import torch

from amber_compile.kernels.cuda import quantized_linear as kernels
from amber_compile.kernels.cuda.quantized_linear import launch, rescaled, why_rescaled

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
RESULTS = [BF16, FP16, FP32]
SIZES = [(1, 64, 128), (17, 24, 40), (5, 13, 19), (33, 16, 16), (2, 8, 4096)]
"""Tokens, outputs and channels: whole ones, and tails that cuBLAS does not take."""


def problem(codes, tokens, outputs, channels, bias=None, seed=0):
    """Return the arguments of ``launch`` but the last."""
    generator = torch.Generator().manual_seed(seed)
    if codes == torch.int8:
        x = torch.randint(-127, 128, (tokens, channels), generator=generator).to(torch.int8)
        weight = torch.randint(-127, 128, (outputs, channels), generator=generator).to(torch.int8)
    else:
        x = torch.randn(tokens, channels, generator=generator).to(FP8)
        weight = torch.randn(outputs, channels, generator=generator).to(FP8)
    size = 0.01 if codes == torch.int8 else 1.0  # results that fp16 holds
    rows, columns = ((torch.rand(n, generator=generator) + 0.1) * size for n in (tokens, outputs))
    shift = None if bias is None else torch.randn(outputs, generator=generator).to(bias)
    return x, rows, weight, columns, shift


def definition(x, rows, weight, columns, bias, dtype):
    """Return what amber::quantized_linear is; sums of int8 codes are exact."""
    precision = torch.float64 if x.dtype == torch.int8 else FP32
    y = (x.to(precision) @ weight.to(precision).T).float() * rows[..., None] * columns
    return (y if bias is None else y + bias.float()).to(dtype)


def assert_same_bits(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    integer = {2: torch.int16, 4: torch.int32}[actual.dtype.itemsize]
    assert torch.equal(actual.contiguous().view(integer), expected.contiguous().view(integer))


def assert_near(actual, operands, dtype):
    """Compare with fp64: twice the error of fp32 sums, and the roundings of scales and result."""
    x, rows, weight, columns, bias = operands
    shift = 0.0 if bias is None else bias.double()
    exact = x.double() @ weight.double().T * rows.double()[..., None] * columns.double()
    size = x.double().abs() @ weight.double().abs().T * rows.double()[..., None] * columns.double()
    low = definition(*operands, FP32).double()
    worst = (low - exact - shift).abs().amax()
    roundings = (x.shape[-1] + 3) * 2.0**-24 * size + torch.finfo(dtype).eps * (exact + shift).abs()
    roundings = roundings + torch.finfo(dtype).tiny
    assert ((actual.double() - exact - shift).abs() <= 2 * worst + roundings).all()


@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("bias", [None, BF16, FP32])
@pytest.mark.parametrize("sizes", SIZES)
def test_int8_is_the_definition(dtype, bias, sizes):
    operands = problem(torch.int8, *sizes, bias)
    assert_same_bits(launch(*operands, dtype), definition(*operands, dtype))


@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("bias", [None, BF16, FP32])
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_is_near(dtype, bias, sizes):
    operands = problem(FP8, *sizes, bias)
    y = launch(*operands, dtype)
    assert (y.shape, y.dtype) == (sizes[:2], dtype)
    assert_near(y, operands, dtype)


def test_fp8_where_no_tensor_core_has_it(monkeypatch):
    """The codes as bf16; PyTorch has this product for CUDA only, so its operands are looked at."""
    called = []

    def mm(x, weight, out_dtype):
        called.append((x.dtype, weight.dtype, out_dtype))
        return x.to(out_dtype) @ weight.to(out_dtype)

    monkeypatch.setattr(kernels, "multiplies_fp8", lambda device: False)
    monkeypatch.setattr(torch, "mm", mm)
    operands = problem(FP8, 5, 24, 48, BF16)
    assert_near(launch(*operands, BF16), operands, BF16)
    assert called == [(BF16, BF16, FP32)]


@pytest.mark.parametrize("codes", [torch.int8, FP8])
def test_leading_dimensions_and_strides(codes):
    x, rows, weight, columns, bias = problem(codes, 12, 24, 48, BF16)
    expected = launch(x, rows, weight, columns, bias, BF16)
    shaped = launch(x.view(3, 4, 48), rows.view(3, 4), weight, columns, bias, BF16)
    assert_same_bits(shaped, expected.view(3, 4, 24))
    assert_same_bits(launch(x[0], rows[0], weight, columns, bias, BF16), expected[0])
    moved = x.view(3, 4, 48).transpose(0, 1)
    turned = launch(moved, rows.view(3, 4).T, weight, columns, bias, BF16)
    assert_same_bits(turned, expected.view(3, 4, 24).transpose(0, 1))


@pytest.mark.parametrize("codes", [torch.int8, FP8])
@pytest.mark.parametrize("sizes", [(32, 16, 64), (3, 13, 19)])
def test_a_row_without_a_scale_has_no_result(codes, sizes):
    operands = problem(codes, *sizes)
    operands[1][1] = float("nan")
    y = launch(*operands, BF16)
    assert y.isnan().all(-1).tolist() == [row == 1 for row in range(sizes[0])]


def test_which_products_scale_themselves():
    fp8, int8 = problem(FP8, 32, 32, 32, BF16), problem(torch.int8, 32, 32, 32)
    assert why_rescaled(fp8[0], fp8[2], None, BF16) is None
    assert why_rescaled(fp8[0], fp8[2], fp8[4], BF16) is None
    assert "no bias of torch.float32" in why_rescaled(fp8[0], fp8[2], fp8[4].float(), BF16)
    assert "no result of torch.float16" in why_rescaled(fp8[0], fp8[2], None, FP16)
    assert "N = 24 is not a multiple of 16" in why_rescaled(fp8[0], fp8[2][:24], None, BF16)
    assert "has no scales" in why_rescaled(int8[0], int8[2], None, BF16)


@pytest.mark.parametrize("codes", [torch.int8, FP8])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("sizes", SIZES)
def test_cublas_gets_what_it_takes(monkeypatch, codes, dtype, sizes):
    """PyTorch's checks on CUDA (_int_mm, _scaled_mm), which it leaves out on a CPU."""
    name, unit = ("_int_mm", 8) if codes == torch.int8 else ("_scaled_mm", 16)
    multiply, seen = getattr(torch, name), []

    def checked(x, weight, *rest, **named):
        assert x.is_contiguous()
        assert weight.t().is_contiguous()
        assert (len(x) > 16) if codes == torch.int8 else len(x) % 16 == 0
        assert [size % unit for size in (x.shape[1], *weight.shape)] == [0, 0, 0]
        if rest and rest[0].numel() > 1:
            assert [scale.shape for scale in rest[:2]] == [(len(x), 1), (1, weight.shape[1])]
            assert named["out_dtype"] == BF16
            assert all(scale.is_contiguous() for scale in rest[:2])
        seen.append(name)
        return multiply(x, weight, *rest, **named)

    monkeypatch.setattr(torch, name, checked)
    launch(*problem(codes, *sizes, BF16), dtype)
    assert seen == [name]


def test_whole_operands_are_not_copied(monkeypatch):
    seen = []
    multiply = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: seen.append((x, w)) or multiply(x, w))
    x, rows, weight, columns, _ = problem(torch.int8, 32, 16, 64)
    launch(x, rows, weight, columns, None, BF16)
    assert [each.data_ptr() for each in seen[0]] == [x.data_ptr(), weight.data_ptr()]
    off = torch.empty(16 * 64 + 1, dtype=torch.int8)[1:].view(16, 64).copy_(weight)
    assert_same_bits(
        launch(x, rows, off, columns, None, BF16), launch(x, rows, weight, columns, None, BF16)
    )
    assert seen[1][1].data_ptr() % 16 == 0


def test_triton_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    operands = problem(torch.int8, 17, 24, 40)
    assert_same_bits(launch(*operands, BF16), definition(*operands, BF16))


# ---- the Triton kernel ---------------------------------------------------------------------------


@pytest.mark.usefixtures("bfloat16_conversions")
@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("acc", [torch.int32, FP32])
@pytest.mark.parametrize("bias", [None, BF16, FP32, torch.float64])
def test_rescaling_is_that_of_tensor_operations(dtype, acc, bias):
    from interpreted import interpreted

    rescale = interpreted("amber_compile.kernels.cuda.rescale").launch
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(1 << 30), 1 << 30, (20, 560), generator=generator).to(acc)
    rows, columns = (torch.rand(n, generator=generator) * 1e-6 for n in (19, 530))
    rows[3] = float("nan")
    shift = None if bias is None else torch.randn(530, generator=generator).to(bias)
    with np.errstate(all="ignore"):
        y = rescale(sums, rows, columns, shift, dtype)
    expected = rescaled(sums, rows, columns, shift, dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_same_bits(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_rescaling_compiles_to(target):
    from aot import compile_for

    from amber_compile.kernels.cuda.rescale import OPTIONS, SHAPE, rescale_kernel

    types = {"acc_ptr": "*i32:16", "y_ptr": "*bf16:16", "bias_ptr": "*bf16:16"}
    types |= dict.fromkeys(("row_scale_ptr", "weight_scale_ptr"), "*fp32:16")
    types |= {"tokens": "i32", "outputs": "i32:16", "acc_stride": "i32:16"}
    kernel = compile_for(target, rescale_kernel, types, SHAPE, **OPTIONS)
    assert kernel.spills == kernel.spilled_bytes == 0
    assert kernel.registers <= 128
    assert kernel.wide_loads >= 8  # 32 sums a thread
    assert kernel.wide_stores == 4
    assert "fma.rn.f32" not in kernel.ptx


# ---- a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("codes", [torch.int8, FP8])
@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("bias", [None, BF16, FP32])
@pytest.mark.parametrize("sizes", [*SIZES, (1, 4096, 4096), (2048, 4096, 4096), (300, 1000, 1096)])
def test_on_a_gpu(codes, dtype, bias, sizes):
    operands = problem(codes, *sizes, bias)
    y = launch(*(None if each is None else each.cuda() for each in operands), dtype).cpu()
    if codes == torch.int8:
        assert_same_bits(y, definition(*operands, dtype))
    else:
        assert_fp8_is_near(y, operands, dtype)


def assert_fp8_is_near(y, operands, dtype):
    """Compare in the Frobenius norm with twice the error of another product of the tensor cores."""
    from gpu_problems import low_precision_product

    x, rows, weight, columns, bias = operands
    scales = rows.double()[:, None] * columns.double()
    shift = 0.0 if bias is None else bias.double()
    exact = x.double() @ weight.double().T * scales + shift
    low = low_precision_product(x.cuda(), weight.cuda()).cpu().double() * scales + shift
    rounding = (torch.finfo(dtype).eps + 4 * 2.0**-24) * exact.norm()
    assert (y.double() - exact).norm() <= 2 * (low - exact).norm() + rounding
