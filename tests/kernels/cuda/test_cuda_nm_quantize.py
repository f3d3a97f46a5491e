"""The Triton kernel of nm_quantize and quantize_rows against the reference, bit for bit.

In the interpreter, where it rounds to e4m3 by integers as on sm_80, and on a GPU. Corrected scales
may differ by the rounding of their sums.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import interpreted

from amber_compile.kernels.nm_quantize import nm_quantize_reference

pytestmark = pytest.mark.usefixtures("bfloat16_conversions")

kernels = interpreted(
    "amber_compile.kernels.cuda.nm_quantize",
    "amber_compile.kernels.cuda.nm_select",
    "amber_compile.kernels.cuda.channel_groups",
    "amber_compile.kernels.cuda.codes",
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = ["int8", "fp8"]
CORRECTIONS = [None, "norm", "variance"]
PATTERNS = [(2, 4), (1, 2), (4, 8), (8, 16), (5, 32), (4, 4)]
INF, NAN = float("inf"), float("nan")
ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, INF, -INF, NAN, 1e-40, -1e-41, 6e-8, 3e38, 65504.0]
ODD_FACTORS = [0.0, 1.0, 1.0, 0.5, 2.0, -2.0, 3.0, 1e-38, 1e30, INF, NAN]


def on_cpu(*arguments):
    with np.errstate(all="ignore"):
        return kernels.launch(*arguments)


def on_gpu(*arguments):
    from amber_compile.kernels.cuda.nm_quantize import launch

    moved = (each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments)
    return tuple(result.cpu() for result in launch(*moved))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def launch(request):
    return on_cpu if request.param == "cpu" else on_gpu


def sample(values, shape, dtype, seed):
    """Return a tensor of ``values`` drawn at random; what overflows becomes infinite."""
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.choice(values, shape), dtype=torch.float64).to(dtype)


def gaussian(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(launch, x, factor, smooth, n, m, dtype, correction=None, prefix=0, offsets=None):
    """Compare bit for bit; a corrected scale within the rounding of its sums.

    A sum of K squares in any order errs by at most K roundings, and a mean before it by as many. Of
    the two sums the root of the ratio is taken, which halves their errors; twelve roundings follow.
    """
    codes, scale = launch(x, factor, smooth, n, m, dtype, correction, prefix, offsets)
    expected, expected_scale = nm_quantize_reference(
        x, factor, smooth, n, m, dtype, correction, prefix, 0, offsets
    )
    assert (codes.shape, codes.dtype) == (expected.shape, expected.dtype)
    assert codes.is_contiguous()
    differ = codes.view(torch.uint8) != expected.view(torch.uint8)
    assert not differ.any(), f"differ at {differ.nonzero()[:5].tolist()}"
    rounding = 0 if correction is None else 2 * (x.shape[-1] + 12) * 2.0**-24
    torch.testing.assert_close(scale, expected_scale, rtol=rounding, atol=0, equal_nan=True)


@settings(
    max_examples=15,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    codes=st.sampled_from(CODES),
    pattern=st.sampled_from(PATTERNS),
    tokens=st.integers(1, 2),
    groups=st.integers(1, 3),
    weighted=st.booleans(),
    smoothed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_odd_values(launch, dtype, codes, pattern, tokens, groups, weighted, smoothed, seed):
    channels = groups * pattern[1]
    x = sample(ODD_VALUES, (tokens, channels), dtype, seed)
    x[::2] = gaussian(*x[::2].shape, dtype=dtype, seed=seed)  # rows with a finite scale
    factor = sample(ODD_FACTORS, channels, torch.float32, seed + 1) if weighted else None
    smooth = sample([0.5, -1.5, 1e-38, 1e4], channels, torch.float32, seed + 2)
    check(launch, x, factor, smooth if smoothed else None, *pattern, codes)


@pytest.mark.parametrize(
    ("dtype", "codes", "correction", "pattern"),
    [
        (torch.bfloat16, "int8", "norm", (2, 4)),
        (torch.bfloat16, "fp8", "variance", (2, 4)),
        (torch.float16, "fp8", "norm", (4, 8)),
        (torch.float32, "int8", "variance", (2, 4)),
        (torch.float32, "fp8", None, (4, 4)),
        (torch.bfloat16, "int8", "norm", (1, 1)),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_ordinary_values(launch, dtype, codes, correction, pattern, plain):
    x, smooth = gaussian(3, 336, dtype=dtype), torch.rand(336) + 0.5
    factor = gaussian(336, dtype=torch.float32, seed=1).abs()
    vectors = (None, None) if plain else (factor, smooth)
    check(launch, x, *vectors, *pattern, codes, correction)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("codes", "n", "m"), [("int8", 2, 4), ("fp8", 1, 1)])
def test_a_row_of_several_blocks(monkeypatch, launch, codes, correction, n, m):
    monkeypatch.setattr(kernels, "MOST_THREADS", 2)
    x, smooth = gaussian(3, 80), torch.rand(80) + 0.5
    x[0, 5] = x[1, -5] = x[2, 36] = 30  # the largest: in the first block, the last, the middle
    check(launch, x, gaussian(80, dtype=torch.float32).abs(), smooth, n, m, codes, correction)


@pytest.mark.parametrize(("dtype", "codes"), [(torch.bfloat16, "fp8"), (torch.float16, "int8")])
def test_every_finite_value_is_quantised(launch, dtype, codes):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    every = every[every.float().abs().argsort()]  # so that rows have values of like magnitude
    x = every[: len(every) // 1024 * 1024].view(-1, 1024)
    check(launch, x, None, None, 1, 1, codes)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-38, 2**-126 * 100, 1e-30, 1e30, 3e38])
def test_rows_of_any_magnitude(launch, codes, magnitude):
    x = (gaussian(2, 64, dtype=torch.float32) * magnitude).clamp(-3.3e38, 3.3e38)
    check(launch, x, None, None, 2, 4, codes, "norm")
    check(launch, x.bfloat16(), None, torch.full((64,), 1.5), 4, 4, codes)


@pytest.mark.parametrize("codes", CODES)
def test_rows_that_are_not_finite(launch, codes):
    x, smooth = gaussian(5, 64), torch.ones(64)
    x[0, 3], x[1, 6], x[2, 9], smooth[3] = 3e38, INF, NAN, 2.0
    check(launch, x, None, smooth, 2, 4, codes, "norm")
    scale = launch(x, None, smooth, 2, 4, codes)[1]
    assert scale.isnan().tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_prefix_of_every_sequence_keeps_all(launch, codes, correction):
    x = gaussian(2, 3, 32)
    check(launch, x, None, torch.rand(32) + 0.5, 2, 4, codes, correction, 2)
    check(launch, x[0], None, None, 2, 4, codes, correction, 2)
    check(launch, x[0, 0], None, None, 2, 4, codes, correction, 1)


@pytest.mark.parametrize("codes", CODES)
def test_each_row_has_the_factor_of_its_expert(launch, codes):
    x, factor = gaussian(11, 32), gaussian(3, 32, dtype=torch.float32).abs()
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)
    check(launch, x, factor, torch.rand(32) + 0.5, 2, 4, codes, "norm", 0, offsets)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[..., 1:65],
        lambda t: t[..., ::2],
        lambda t: t[:1, :1].expand(2, 2, -1),
        lambda t: t[:0],
        lambda t: t[0, 0],
    ],
    ids=["transposed", "odd", "steps", "expanded", "none", "vector"],
)
@pytest.mark.parametrize("codes", CODES)
def test_any_strides(launch, view, codes):
    check(launch, view(gaussian(2, 3, 128)), None, None, 2, 4, codes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("codes", "correction"), [("int8", "norm"), ("fp8", "variance"), ("fp8", None)]
)
@pytest.mark.parametrize("pattern", [(2, 4), (16, 32), (1, 1)])
@pytest.mark.parametrize(("tokens", "channels"), [(203, 576), (33, 8192), (40, 14336), (3, 53248)])
def test_large_rows_on_a_gpu(dtype, codes, correction, pattern, tokens, channels):
    """The compiled kernel, the hardware's conversion to e4m3 among it."""
    x = gaussian(tokens, channels, dtype=dtype)
    if tokens > 20:
        x[3], x[4, 5], x[5, ::3], x[6] = 0, INF, NAN, x[6] * 2.0**-20
    factor = gaussian(channels, dtype=torch.float32, seed=1).abs()
    check(on_gpu, x, factor, torch.rand(channels) + 0.5, *pattern, codes, correction)
