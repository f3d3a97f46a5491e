"""``torch.ops.amber.quantized_linear``: what it answers and refuses, and what PyTorch sees."""

from functools import partial

import pytest
import torch
from int8_problems import RESULTS, codes_of, prepared, problem
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels.int8_kernel import int8_kernel
from amber_compile.kernels.prepared_weight import prepare_weight

quantized_linear = torch.ops.amber.quantized_linear
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25, torch.float32: 2.0**-149}
FP8 = torch.float8_e4m3fn

# ---- operator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_results_are_within_rounding(kind, bias, dtype):
    """int8: four fp32 roundings, one to the result. fp8: the K roundings of its sums as well."""
    codes, row, weight, column, add = problem(21, 100, 24, bias)
    codes, weight = codes.to(kind), weight.to(kind)
    y = quantized_linear(*prepared(codes, row, weight, column, add), dtype)
    scale = row.double()[:, None] * column.double()
    offset = add.double() if bias else torch.zeros(24).double()
    exact = codes.double() @ weight.double().T * scale + offset
    size = codes.double().abs() @ weight.double().abs().T * scale.abs() + offset.abs()
    error = (4 if kind == torch.int8 else 104) * 2.0**-24 * size
    finite = exact.abs() < torch.finfo(dtype).max
    assert finite.any()
    within = (y.double() - exact).abs() <= error + UNIT[dtype] * (exact.abs() + error) + TINY[dtype]
    assert y.dtype == dtype
    assert (within | ~finite).all()


@pytest.mark.parametrize("kind", [torch.int8, FP8])
@pytest.mark.parametrize("shape", [(100,), (0, 100), (2, 3, 100), (4, 0), (2, 2)])
def test_leading_dimensions_are_kept(kind, shape):
    codes, weight = codes_of(*shape).to(kind), codes_of(7, shape[-1], seed=1).to(kind)
    row, column = torch.rand(shape[:-1]), torch.rand(7)
    y = quantized_linear(*prepared(codes, row, weight, column, None), torch.float32)
    assert y.shape == (*shape[:-1], 7)
    expected = codes.double() @ weight.double().T
    assert torch.equal(y, expected.float() * row[..., None] * column)


def test_no_outputs():
    codes, row, weight, column, bias = problem(3, 8, 0)
    y = quantized_linear(*prepared(codes, row, weight, column, bias), torch.bfloat16)
    assert y.shape == (3, 0)


def test_any_strides_will_do(assert_same_bits):
    codes, row, weight, column, bias = problem(6, 100, 40)
    expected = quantized_linear(*prepared(codes, row, weight, column, bias), torch.bfloat16)
    packed = prepare_weight(weight.T.contiguous().T)
    rows, every_other = (torch.zeros(6, 200, dtype=torch.int8) for _ in range(2))
    rows, every_other = rows[:, 50:150].copy_(codes), every_other[:, ::2].copy_(codes)
    for strided in (rows, every_other, codes.T.contiguous().T):
        r, c, b = (torch.stack((vector, vector), -1)[:, 0] for vector in (row, column, bias))
        y = quantized_linear(strided, r, packed, c, b, torch.bfloat16)
        assert_same_bits(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_bias_of_any_type(assert_same_bits, dtype):
    *arguments, bias = prepared(*problem(3, 64, 40))
    y = quantized_linear(*arguments, bias.to(dtype), torch.bfloat16)
    assert_same_bits(y, quantized_linear(*arguments, bias.to(dtype).float(), torch.bfloat16))


C, R, W, S, B = problem(3, 64, 40)
BAD_ARGUMENTS = {
    "codes are torch.float32 .*; valid: torch.int8, torch.float8_e4m3fn": lambda c, w: c(
        C.float(), R, w, S, B, R.dtype
    ),
    r"codes are torch.int8 \[\]; valid": lambda c, w: c(C[0, 0], R[0], w, S, B, R.dtype),
    "codes have 131073 channels; valid: up to 131072": lambda c, w: c(
        C[:, :1].expand(3, 131073), R, w, S, B, R.dtype
    ),
    r"row_scale has shape \[2\]; valid: \[3\]": lambda c, w: c(C, R[:2], w, S, B, R.dtype),
    "row_scale has dtype torch.float64; valid: torch.float32": lambda c, w: c(
        C, R.double(), w, S, B, R.dtype
    ),
    "row_scale is on meta; valid: the device of codes, cpu": lambda c, w: c(
        C, R.to("meta"), w, S, B, R.dtype
    ),
    r"weight has shape \[40, 64\]; valid: .*which prepare_weight makes of \[40, 64\] codes": (
        lambda c, w: c(C, R, W, S, B, R.dtype)
    ),
    "weight has dtype torch.uint8; valid: that of codes, torch.int8": lambda c, w: c(
        C, R, w.view(torch.uint8), S, B, R.dtype
    ),
    "weight is on meta": lambda c, w: c(C, R, w.to("meta"), S, B, R.dtype),
    r"weight_scale has shape \[40, 1\]; valid: \[N\]": lambda c, w: c(
        C, R, w, S[:, None], B, R.dtype
    ),
    "weight_scale has dtype torch.bfloat16": lambda c, w: c(C, R, w, S.bfloat16(), B, R.dtype),
    r"bias has shape \[8\]; valid: \[40\]": lambda c, w: c(C, R, w, S, B[:8], R.dtype),
    "bias has dtype torch.int32; valid: a floating type": lambda c, w: c(
        C, R, w, S, B.int(), R.dtype
    ),
    "dtype=torch.int8; valid: torch.bfloat16, torch.float16, torch.float32": lambda c, w: c(
        C, R, w, S, B, torch.int8
    ),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
@pytest.mark.parametrize("traced", [False, True])
def test_bad_arguments_are_named(message, traced):
    if "prepare_weight" in message and int8_kernel() == "reference":
        pytest.skip("waits for a C++ compiler: nothing is packed")

    def call(*arguments):
        if not traced:
            return quantized_linear(*arguments)
        with FakeTensorMode() as mode:
            tensors = (
                mode.from_tensor(each) if isinstance(each, torch.Tensor) else each
                for each in arguments
            )
            return quantized_linear(*tensors)

    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](call, prepare_weight(W))


# ---- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_opcheck(kind):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks.append("test_aot_dispatch_dynamic")
    if kind == FP8:
        del checks[0]  # it adds to its inputs, which torch cannot do with fp8
    codes, row, weight, column, bias = problem(5, 64, 40)
    arguments = prepared(codes.to(kind), row, weight.to(kind), column, bias)
    torch.library.opcheck(quantized_linear.default, (*arguments, torch.bfloat16), test_utils=checks)


def test_a_gradient_is_refused():
    codes, row, weight, column, bias = prepared(*problem(3, 64, 40))
    y = quantized_linear(codes, row.requires_grad_(), weight, column, bias, torch.float32)
    with pytest.raises(RuntimeError, match="amber::quantized_linear is for inference only"):
        y.sum().backward()


@torch.no_grad()
def test_one_graph_serves_all_token_counts():
    product = partial(quantized_linear, dtype=torch.bfloat16)
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        for tokens in (33, 50, 200):
            arguments = prepared(*problem(tokens, 128, 40))
            assert torch.equal(compiled(*arguments), product(*arguments))
            torch.compiler.set_stance("fail_on_recompile")
