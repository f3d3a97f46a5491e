"""The Triton kernels of nm_compress, interpreted on the CPU, bit for bit against the reference.

The interpreter's own conversion to e4m3 loses carries (126.47 becomes 64), so here the kernel
rounds by integers, as it does on sm_80; the hardware's conversion waits for a GPU.
"""

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import interpreted
from triton.runtime.interpreter import InterpretedFunction

from amber_compile.kernels.nm_compress import nm_compress_reference
from amber_compile.kernels.two_four import EMPTY

DTYPES = [torch.bfloat16, torch.float16]
QUANTIZED = [None, "int8", "fp8"]
CORRECTIONS = [None, "norm"]
NAN, INF = float("nan"), float("inf")
ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, INF, -INF, NAN, 1e-40, -1e-41, 6e-8, 3e38, 65504.0]
ODD_FACTORS = [0.0, 1.0, 1.0, 0.5, 2.0, -2.0, 3.0, 1e-38, 1e30, INF, NAN]


@pytest.fixture
def launch(monkeypatch):
    """Launch in the interpreter, Triton's own reductions included; NumPy says nothing of NaN."""
    for name in ("sum", "max"):
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
    with np.errstate(all="ignore"):
        yield interpreted(
            "amber_compile.kernels.cuda.nm_compress",
            "amber_compile.kernels.cuda.packed_groups",
            "amber_compile.kernels.cuda.codes",
        ).launch


def gaussian(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sample(values, shape, dtype, seed):
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.choice(values, shape), dtype=torch.float64).to(dtype)


def integers(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def check(launch, x, factor, quantize, correction, smooth=None):
    """Compare bit for bit; a correction within the rounding of its sums.

    A sum of K squares in any order errs by at most K roundings. Of the two sums the root of the
    ratio is taken, which halves their errors, and twelve more roundings follow on both sides.
    """
    values, metadata, scale = launch(x, factor, quantize, correction, smooth)
    expected = nm_compress_reference(x, factor, quantize, correction, smooth)
    for name, actual, wanted in zip(
        ("values", "metadata"), (values, metadata), expected, strict=False
    ):
        assert actual.dtype == wanted.dtype
        differ = integers(actual) != integers(wanted)
        assert not differ.any(), f"{name} differ at {differ.nonzero()[:5].tolist()}"
    rounding = 0 if correction is None else 2 * (x.shape[1] + 12) * 2.0**-24
    torch.testing.assert_close(scale, expected[2], rtol=rounding, atol=0, equal_nan=True)


@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    quantize=st.sampled_from(QUANTIZED),
    correction=st.sampled_from(CORRECTIONS),
    tokens=st.integers(1, 18),
    blocks=st.integers(1, 3),
    weighted=st.booleans(),
    smoothed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_odd_values(launch, dtype, quantize, correction, tokens, blocks, weighted, smoothed, seed):
    x = sample(ODD_VALUES, (tokens, 64 * blocks), dtype, seed)
    x[::2] = gaussian(*x[::2].shape, dtype=dtype, seed=seed)
    factor = sample(ODD_FACTORS, 64 * blocks, torch.float32, seed + 1) if weighted else None
    smooth = sample(ODD_FACTORS, 64 * blocks, torch.float32, seed + 2)
    smooth[np.random.default_rng(seed).random(64 * blocks) < 0.9] = 1.5  # some rows are finite
    check(launch, x, factor, quantize, correction, smooth if smoothed and quantize else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [
        (17, 64),  # a tile of one row
        (9, 576),  # more than one block of columns without a correction
        (2, 2112),  # more than one step
    ],
)
def test_ordinary_values(launch, dtype, weighted, quantize, correction, tokens, channels):
    x = gaussian(tokens, channels, dtype=dtype)
    factor = gaussian(channels, dtype=torch.float32, seed=1).abs() if weighted else None
    check(launch, x, factor, quantize, correction)
    if quantize:
        smooth = gaussian(channels, dtype=torch.float32, seed=2)
        check(launch, x, factor, quantize, correction, smooth)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_one_row_a_program(launch, quantize):
    factor = gaussian(8256, dtype=torch.float32, seed=1).abs()
    check(launch, gaussian(9, 8256)[[0, 8]], factor, quantize, "norm")
    check(launch, gaussian(9, 8256), None, quantize, None, factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_value_of_sixteen_bits(launch, dtype, weighted):
    """In a random order, with every NaN."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = every[torch.randperm(1 << 16, generator=generator)].view(dtype).view(128, 512)
    check(launch, x, torch.rand(512, generator=generator) if weighted else None, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_every_finite_value_is_quantised(launch, dtype, quantize):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    every = every[every.float().abs().argsort()]  # so that rows have values of like magnitude
    x = torch.zeros(32, 4096, dtype=dtype)
    x.view(-1, 2)[: len(every), 0] = every
    check(launch, x[: len(every) // 2048 + 1], None, quantize, None)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-38, 2**-126 * 100, 1e-30, 1e30, 3e38])
def test_rows_of_any_magnitude(launch, quantize, magnitude):
    x = (torch.randn(4, 128) * magnitude).clamp(-3.3e38, 3.3e38).bfloat16()
    check(launch, x, None, quantize, "norm")


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_rows_that_are_not_finite_once_smoothed(launch, quantize):
    x, smooth = gaussian(5, 64), torch.ones(64)
    x[0, 3], x[1, 6], x[2, 9], smooth[3] = 3e38, INF, NAN, 2.0
    check(launch, x, None, quantize, None, smooth)
    assert launch(x, None, quantize, None, smooth)[2].isnan().tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_missing_rows_are_empty_whatever_the_factor(launch, quantize):
    x, factor = gaussian(3, 64), torch.ones(64)
    factor[3::4] = INF  # makes NaN of a zero, in one channel of each group
    _, metadata, _ = launch(x, factor, quantize, "norm")
    check(launch, x, factor, quantize, "norm")
    words = metadata[0].view(8, 4)
    assert (words[3:] == EMPTY).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 64:192],
        lambda t: t[:, 4:68],
        lambda t: t[:, 1:65],  # rows that no word divides
        lambda t: t.flatten()[: 6 * 130].view(6, 130)[:, :128],
        lambda t: t[:1].expand(5, -1),
        lambda t: t[::3],
        lambda t: t[:0],
    ],
    ids=["columns", "words", "odd", "odd stride", "expanded", "rows", "none"],
)
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_any_row_stride(launch, view, quantize):
    check(launch, view(gaussian(9, 256)), None, quantize, "norm")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [(1, 64), (203, 576), (64, 4096), (33, 8192), (40, 14336), (5, 28672), (3, 53248)],
)
def test_on_a_gpu(dtype, quantize, correction, weighted, tokens, channels):
    """The compiled kernels, the hardware's conversion to e4m3 among them."""
    from amber_compile.kernels.cuda.nm_compress import launch

    x = gaussian(tokens, channels, dtype=dtype)
    if tokens > 20:
        x[3], x[4, 5], x[5, ::3], x[6] = 0, INF, NAN, x[6] * 2.0**-20
    factor = gaussian(channels, dtype=torch.float32, seed=1).abs() if weighted else None

    def on_the_gpu(x, factor, quantize, correction, smooth):
        x, factor, smooth = (None if t is None else t.cuda() for t in (x, factor, smooth))
        results = launch(x, factor, quantize, correction, smooth)
        return tuple(result.cpu() for result in results)

    smooth = gaussian(channels, dtype=torch.float32, seed=2) if quantize and weighted else None
    check(on_the_gpu, x, factor, quantize, correction, smooth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_every_value_on_a_gpu(dtype, quantize):
    from amber_compile.kernels.cuda.nm_compress import launch

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every if quantize is None else every[every.isfinite()][: 1 << 15]
    x = every[every.float().abs().argsort()].view(-1, 512)
    check(lambda x, *rest: tuple(y.cpu() for y in launch(x.cuda(), *rest)), x, None, quantize, None)
