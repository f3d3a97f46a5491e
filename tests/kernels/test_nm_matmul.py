"""``torch.ops.amber.nm_matmul``: its reference against dense products, and what PyTorch sees."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels.cuda.device import KINDS, MMA_SP, WGMMA_SP
from amber_compile.kernels.nm_compress import nm_compress
from amber_compile.kernels.two_four import expand, pack_metadata

MODULE = sys.modules["amber_compile.kernels.nm_matmul"]
nm_matmul = torch.ops.amber.nm_matmul
RESULTS = [torch.bfloat16, torch.float16, torch.float32]
TOKENS, OUTPUTS, CHANNELS = 21, 24, 128
GENERATOR = torch.Generator().manual_seed(0)
ROW = torch.rand(TOKENS, generator=GENERATOR) + 0.5
COL = torch.rand(OUTPUTS, generator=GENERATOR) - 0.5
BIAS = torch.randn(OUTPUTS, generator=GENERATOR) * 9
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25, torch.float32: 2.0**-149}


def elements(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def operands(dtype, tokens=TOKENS, outputs=OUTPUTS, channels=CHANNELS):
    """Return values, metadata and weight, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    pairs = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8)
    nibbles = pairs[torch.randint(6, (tokens, channels // 4), generator=generator)]
    metadata = pack_metadata(nibbles, 8 * dtype.itemsize)
    values, weight = elements(dtype, tokens, channels // 2), elements(dtype, outputs, channels)
    return values, metadata, weight


def budget(size, exact, channels, dtype):
    """fp32 sums of K terms and three fp32 roundings, then one to the result."""
    sums = (channels + 3) * 2.0**-24 * size
    return sums + UNIT[dtype] * (exact.abs() + sums) + TINY[dtype]


# ---- reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", RESULTS)
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("col", [None, COL])
@pytest.mark.parametrize("row", [None, ROW])
@pytest.mark.parametrize("dtype", KINDS)
def test_the_product_is_that_of_the_expanded_rows(dtype, row, col, bias, out_dtype):
    values, metadata, weight = operands(dtype)
    y = nm_matmul(values, metadata, weight, bias, row, col, out_dtype)
    scale = (1 if row is None else row.double()[:, None]) * (1 if col is None else col.double())
    add = torch.zeros(()) if bias is None else bias
    dense, weight = expand(values, metadata).double(), weight.double()
    exact = dense @ weight.T * scale + add.double()
    if out_dtype == torch.float16:
        exact = exact.clamp(-1e300, 1e300)
    size = dense.abs() @ weight.abs().T * abs(scale) + add.double().abs()
    finite = exact.abs() < torch.finfo(out_dtype).max
    assert y.dtype == out_dtype
    within = (y.double() - exact).abs() <= budget(size, exact, CHANNELS, out_dtype)
    assert (within | ~finite).all()
    assert torch.equal(y.isfinite(), finite)


def test_int8_is_exact():
    """2^24 + 1 is a sum that fp32 does not hold: rounded once, after the last term."""
    channels = 4096
    values = torch.full((1, channels // 2), 127, dtype=torch.int8)
    metadata = pack_metadata(torch.full((1, channels // 4), 4, dtype=torch.uint8), 8)
    weight = torch.full((8, channels), 127, dtype=torch.int8)
    weight[:, 0] = torch.arange(8)
    y = nm_matmul(values, metadata, weight, out_dtype=torch.float32)
    exact = 127 * (127 * (channels // 2 - 1) + torch.arange(8))
    assert exact.min() > 1 << 24
    assert torch.equal(y[0], exact.float())


def test_scales_and_bias_are_applied_in_order():
    """fp32 overflows at the first product if the column's scale comes first."""
    values, metadata, weight = operands(torch.int8)
    small = torch.full((TOKENS,), 1e-30)
    large = torch.full((OUTPUTS,), 1e38)
    y = nm_matmul(values, metadata, weight, None, small, large, torch.float32)
    assert y.isfinite().all()
    acc = (expand(values, metadata).double() @ weight.double().T).float()
    assert torch.equal(y, acc * small[:, None] * large)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_result_has_a_dtype_of_its_own_accord(dtype):
    expected = dtype if dtype.itemsize == 2 else torch.bfloat16
    assert nm_matmul(*operands(dtype)).dtype == expected


@pytest.mark.parametrize(("tokens", "outputs"), [(0, 8), (16, 0), (0, 0)])
def test_nothing_to_multiply(tokens, outputs):
    assert nm_matmul(*operands(torch.int8, tokens, outputs)).shape == (tokens, outputs)


def test_no_channels_are_a_sum_of_nothing():
    y = nm_matmul(*operands(torch.float16, channels=0), BIAS)
    assert torch.equal(y, BIAS.half().expand(TOKENS, OUTPUTS))


@pytest.mark.parametrize(("quantize", "steps"), [(None, 0), ("int8", 127), ("fp8", 16)])
def test_what_is_compressed_is_multiplied(quantize, steps):
    """The quantised product is off by at most half a step a kept channel."""
    x = elements(torch.bfloat16, TOKENS, CHANNELS)
    weight = elements(torch.int8, OUTPUTS, CHANNELS)
    kept = torch.ops.amber.nm_select(x, None, 2, 4).double()
    values, metadata, scale = nm_compress(x, None, quantize)
    operand = weight.to(values.dtype)
    y = nm_matmul(values, metadata, operand, None, scale if quantize else None, None, torch.float32)
    step = kept.abs().amax(1, keepdim=True) / steps if steps else torch.zeros(TOKENS, 1)
    off = operand.double().abs()
    allowed = step * 0.51 * (expand(values, metadata).double() != 0).double() @ off.T
    exact = kept @ operand.double().T
    assert (
        (y.double() - exact).abs() <= allowed + budget(kept.abs() @ off.T, exact, 128, y.dtype)
    ).all()


# ---- arguments -----------------------------------------------------------------------------------

V, M, W = operands(torch.bfloat16)
BAD_ARGUMENTS = {
    "values have dtype torch.float32; valid: torch.bfloat16, ": lambda c: c(V.float(), M, W),
    r"values have shape \[21, 40\]; valid: \[T, K/2\]": lambda c: c(V[:, :40], M, W),
    r"values have shape \[1, 21, 64\]": lambda c: c(V[None], M, W),
    "weight has dtype torch.float16; valid: that of values": lambda c: c(V, M, W.half()),
    r"weight has shape \[24, 64\]; valid: \[N, 128\]": lambda c: c(V, M, W[:, :64]),
    r"weight has shape \[20, 128\]; valid: .*multiple of 8": lambda c: c(V, M, W[:20]),
    r"metadata is torch.int32 \[1, 2, 32\]; valid: torch.int32 \[2, 2, 32\]": lambda c: c(
        V, M[:1], W
    ),
    "metadata is torch.int64": lambda c: c(V, M.long(), W),
    r"metadata is torch.int32 \[128\]": lambda c: c(V, M.reshape(-1), W),
    "metadata is on meta; valid: the device of values": lambda c: c(V, M.to("meta"), W),
    "weight is on meta": lambda c: c(V, M, W.to("meta")),
    r"bias has shape \[8\]; valid: \[24\]": lambda c: c(V, M, W, BIAS[:8]),
    "bias has dtype torch.float16; valid: torch.bfloat16, torch.float32": lambda c: c(
        V, M, W, BIAS.half()
    ),
    r"row_scale has shape \[24\]; valid: \[21\]": lambda c: c(V, M, W, None, COL),
    "row_scale has dtype torch.float64; valid: torch.float32": lambda c: c(
        V, M, W, None, ROW.double()
    ),
    r"col_scale has shape \[21\]; valid: \[24\]": lambda c: c(V, M, W, None, None, ROW),
    "col_scale is on meta": lambda c: c(V, M, W, None, None, COL.to("meta")),
    "out_dtype=torch.int8; valid: torch.bfloat16, torch.float16, torch.float32": lambda c: c(
        V, M, W, None, None, None, torch.int8
    ),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message):
    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](nm_matmul)


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named_while_tracing(message):
    def traced(*arguments):
        with FakeTensorMode() as mode:
            tensors = (
                mode.from_tensor(each) if isinstance(each, torch.Tensor) else each
                for each in arguments
            )
            return nm_matmul(*tensors)

    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](traced)


# ---- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
def test_opcheck(dtype):
    checks = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if dtype == torch.float8_e4m3fn:
        del checks[0]  # it adds to its inputs, which torch cannot do with fp8
    for vectors in ((), (BIAS, ROW, COL, torch.float16)):
        arguments = (*operands(dtype), *vectors)
        torch.library.opcheck(nm_matmul.default, arguments, test_utils=checks)


def test_a_gradient_is_refused():
    values, metadata, weight = operands(torch.bfloat16)
    y = nm_matmul(values.requires_grad_(), metadata, weight)
    with pytest.raises(RuntimeError, match="amber::nm_matmul is for inference only"):
        y.sum().backward()


@torch.no_grad()
def test_one_graph_serves_all_token_counts():
    torch.compiler.reset()

    def product(x, weight):
        values, metadata, scale = nm_compress(x, None, "int8")
        return nm_matmul(values, metadata, weight, None, scale)

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True, dynamic=True)
    weight = elements(torch.int8, OUTPUTS, CHANNELS)
    with torch.compiler.set_stance("default"):
        for tokens in (33, 50, 200):
            x = elements(torch.bfloat16, tokens, CHANNELS)
            assert torch.equal(compiled(x, weight), product(x, weight))
            torch.compiler.set_stance("fail_on_recompile")


# ---- dispatch ------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """``device(instruction, …)``: CUDA tensors are on that; what is launched, as a list.

    ``unable`` is what the device says, ``reason`` what the kernel says of the operands.
    """

    def make(instruction, reason=None, unable=None):
        launched = []
        kernel = SimpleNamespace(
            why_not=lambda *_: reason,
            launch=lambda *arguments: launched.append(arguments) or torch.zeros(1),
        )
        monkeypatch.setattr(MODULE, "device_instruction", lambda _: instruction)
        monkeypatch.setattr(MODULE, "why_no_sparse_product", lambda *_: unable)
        monkeypatch.setattr(MODULE, "import_module", lambda name: launched.append(name) or kernel)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        MODULE._tell.cache_clear()
        return launched

    return make


@pytest.mark.parametrize("instruction", [WGMMA_SP, MMA_SP])
def test_a_kernel_is_launched(device, instruction):
    launched = device(instruction)
    arguments = (*operands(torch.int8), BIAS, ROW, COL, torch.float32)
    assert MODULE.why_reference(*arguments) is None
    y = MODULE._nm_matmul_cuda(*arguments)
    assert torch.equal(y, torch.zeros(1))
    assert launched[-2] == f"amber_compile.kernels.cuda.{instruction.module}"
    assert all(given is taken for given, taken in zip(arguments, launched[-1], strict=True))


@pytest.mark.parametrize(
    ("instruction", "reason", "unable"),
    [
        (None, None, "no sparse kernel for compute capability 7.5"),
        (MMA_SP, None, "mma.sp failed its self-test: wrong"),
        (WGMMA_SP, "values are odd", None),
    ],
)
def test_where_no_kernel_can_the_reference_does_and_says_so(device, instruction, reason, unable):
    launched = device(instruction, reason, unable)
    arguments = operands(torch.int8)
    assert MODULE.why_reference(*arguments) == (reason or unable)
    with pytest.warns(UserWarning, match=f"slow reference: {reason or unable}"):
        y = MODULE._nm_matmul_cuda(*arguments)
    assert torch.equal(y, nm_matmul(*arguments))
    MODULE._nm_matmul_cuda(*arguments)  # once is enough: a second warning would be an error
    assert not any(isinstance(each, tuple) for each in launched)
