"""Codes and scales of what ``nm_quantize`` keeps, by either implementation.

What is kept is for ``test_nm_select.py`` to say; here NumPy makes codes of it.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_codes import (
    DTYPES,
    EPS,
    INF,
    NAN,
    check,
    gaussian,
    has_compiler,
    int32,
    oracle,
    positive,
    sample,
)

from amber_compile.kernels.nm_quantize import kernel_for
from amber_compile.kernels.nm_select import nm_select_reference

nm_quantize = torch.ops.amber.nm_quantize
PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (8, 16), (31, 32), (4, 4)]
ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, INF, -INF, NAN, 1e-40, -1e-41, 6e-8, 3e38, 65504.0]
ODD_FACTORS = [0.0, 1.0, 1.0, 0.5, 2.0, -2.0, 3.0, 1e-38, 1e30, INF, NAN]
SMOOTHS = [1.0, 0.5, 3.0, 1e-3, 1e-30, 7.7, 0.0]
X = gaussian(2, 6, 128)

# ---- codes ---------------------------------------------------------------------------------------


@settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(PATTERNS),
    channels=st.sampled_from([32, 64, 96, 128, 160]),
    weighted=st.booleans(),
    smoothed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_odd_values(quantize, dtype, pattern, channels, weighted, smoothed, seed):
    x = sample(ODD_VALUES, (4, channels), dtype, seed)
    x[::2] = gaussian(2, channels, dtype=dtype, seed=seed)  # rows with a finite scale
    factor = sample(ODD_FACTORS, channels, torch.float32, seed + 1) if weighted else None
    smooth = sample(SMOOTHS, channels, torch.float32, seed + 2) if smoothed else None
    kept = nm_select_reference(x, factor, *pattern)
    check(quantize(x, factor, smooth, *pattern), oracle(kept, smooth))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("channels", [64, 992, 1024, 2112])
def test_ordinary_values(quantize, n, m, channels, dtype):
    x, factor, smooth = gaussian(5, channels, dtype=dtype), positive(channels), positive(channels)
    for f in (None, factor):
        kept = nm_select_reference(x, f, n, m)
        for s in (None, smooth):
            check(quantize(x, f, s, n, m), oracle(kept, s))


@pytest.mark.parametrize("channels", [2, 4, 6, 30, 34, 62, 66, 100, 1 << 17])
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (2, 2)])
def test_any_number_of_channels(quantize, channels, pattern):
    if channels % pattern[1]:
        pattern = (1, 2)
    x, factor, smooth = gaussian(2, channels), positive(channels), positive(channels, 2)
    kept = nm_select_reference(x, factor, *pattern)
    check(quantize(x, factor, smooth, *pattern), oracle(kept, smooth))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_every_value_of_sixteen_bits(quantize, dtype, smoothed):
    """Each finite value is kept, beside one that makes the row's scale reach a code's middle."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.zeros(1 << 10, 256, dtype=dtype)
    x.view(-1, 4)[:, 1] = every[every.float().abs().argsort()]
    x.view(-1, 4)[:, 2] = 1
    factor = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(64)
    smooth = positive(256) if smoothed else None
    check(quantize(x, factor, smooth, 2, 4), oracle(nm_select_reference(x, factor, 2, 4), smooth))


@pytest.mark.parametrize("pattern", [(2, 4), (8, 16), (4, 4)])
def test_codes_times_scale_are_near(quantize, pattern):
    """Half a step, and the roundings of reciprocal, product and quotient."""
    x, smooth = gaussian(40, 256), positive(256)
    codes, scale = quantize(x, None, smooth, *pattern)
    exact = nm_select_reference(x, None, *pattern).double() * smooth
    error = (codes.double() * scale[:, None] - exact).abs()
    assert (error <= scale[:, None] / 2 + 3 * EPS * exact.abs()).all()
    assert codes.abs().amax(-1).eq(127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_select_by_their_own_factor(quantize, dtype):
    x, factor = gaussian(40, 128, dtype=dtype), positive(512).view(4, 128)
    ends = [7, 7, 30, 36]  # the second expert has no rows, and the last one those behind the end
    together = quantize(x, factor, None, 2, 4, "norm", 0, int32(*ends))
    groups = zip([0, *ends], [*ends[:-1], 40], factor, strict=False)
    alone = [
        quantize(x[start:end], one, None, 2, 4, "norm") for start, end, one in groups if end > start
    ]
    check(together, map(torch.cat, zip(*alone, strict=True)))


# ---- other types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_fp8(dtype):
    x = gaussian(5, 64, dtype=dtype)
    x[3], x[4, 5] = 0, NAN
    codes, scale = nm_quantize(x, None, None, 2, 4, "fp8", "norm")
    plain = nm_quantize(x, None, None, 2, 4, "fp8")[1]
    kept = nm_select_reference(x, None, 2, 4).float()
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.isnan().tolist() == [False] * 4 + [True]
    assert not codes[3:].float().any()
    dense = codes.float()[:3] * plain[:3, None]
    error = (dense - kept[:3]).abs()  # half of three bits' last place, or of the least of all
    assert (error <= kept[:3].abs() * (2.0**-4 + 4 * EPS) + plain[:3, None] * 2.0**-10).all()
    assert codes[:3].float().abs().amax(-1).eq(448).all()


def test_float64_is_scored_in_float64():
    x = torch.tensor([[1.0, 1.0 + 2**-52, 1.0, 1e-320]], dtype=torch.float64)
    codes, scale = nm_quantize(x, None, None, 1, 4, "int8", "norm")
    assert codes.tolist() == [[0, 127, 0, 0]]
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), torch.tensor([3.0]).double().sqrt() / 127)


def test_what_runs_is_named(monkeypatch):
    assert kernel_for(X, "fp8") == kernel_for(X.double(), "int8") == "reference"
    monkeypatch.setenv("AMBER_CPU_KERNEL", "reference")
    assert kernel_for(X, "int8") == "reference"


@has_compiler
def test_the_cpp_kernel_is_named():
    assert kernel_for(X, "int8") == "C++"
