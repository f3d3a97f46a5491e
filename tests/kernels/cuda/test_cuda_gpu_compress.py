"""Selection and compression on a GPU: bit for bit what the reference on the CPU says."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_problems import BF16, FP16, FP32, FP32_ROUNDING, amber
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

SHAPES = [(1, 64), (15, 128), (16, 64), (17, 192), (77, 448), (128, 4096), (300, 3584), (33, 18944)]
QUANTIZED = (None, "int8", "fp8")
SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 2.0, -2.0)
CHAIN = 64
"""A sum of K terms is at least so many partial sums, so that each adds K / CHAIN terms in turn."""


def activation(seed: int, tokens: int, channels: int, dtype: torch.dtype, special: bool) -> Tensor:
    """Draw activations; special ones hold NaN, infinities, both zeros, ties and denormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    if special:
        choice = torch.randint(len(SPECIAL), x.shape, generator=generator)
        share = torch.rand(tokens, 1, generator=generator)  # from rows of numbers to rows of these
        x = torch.where(
            torch.rand(x.shape, generator=generator) < share, torch.tensor(SPECIAL)[choice], x
        )
        tiny = torch.rand(x.shape, generator=generator) < 0.1
        x = torch.where(tiny, x * torch.finfo(dtype).tiny / 4, x)
    return x.to(dtype)


def factor_of(seed: int, channels: int, special: bool) -> Tensor:
    """Draw a factor; a special one has zeros and infinities too."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.rand(channels, generator=generator) + 0.5
    if special:
        factor[::7], factor[3::11] = 0.0, float("inf")
    return factor


def same_bits(actual: Tensor, expected: Tensor, nan_alike: bool = False) -> bool:
    """Compare bit for bit; with ``nan_alike`` one NaN is as good as another."""
    actual = actual.cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if nan_alike:
        both = actual.isnan() & expected.isnan()
        actual, expected = actual.masked_fill(both, 0), expected.masked_fill(both, 0)
    return torch.equal(actual.contiguous().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_compress_is_the_reference(device, tokens, channels, dtype, quantize):
    for special, factored in itertools.product((False, True), repeat=2):
        x = activation(tokens, tokens, channels, dtype, special)
        factor = factor_of(channels, channels, special) if factored else None
        expected = amber.nm_compress(x, factor, quantize, None)
        moved = None if factor is None else factor.to(device)
        values, metadata, scale = amber.nm_compress(x.to(device), moved, quantize, None)
        assert same_bits(values, expected[0]), (special, factored)
        assert same_bits(metadata, expected[1]), (special, factored)
        assert same_bits(scale, expected[2], nan_alike=True), (special, factored)


@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(device, quantize, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(1, 700, (), generator=generator))
    channels = 64 * int(torch.randint(1, 90, (), generator=generator))
    x, factor = activation(seed, tokens, channels, BF16, True), factor_of(seed, channels, False)
    expected = amber.nm_compress(x, factor, quantize, None)
    actual = amber.nm_compress(x.to(device), factor.to(device), quantize, None)
    for part, wanted in zip(actual, expected, strict=True):
        assert same_bits(part, wanted, nan_alike=part.dtype == FP32)


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_rows_may_have_a_stride(device, quantize):
    wide = activation(0, 100, 512, BF16, False)
    x, moved = wide[:, 128:384], wide.to(device)[:, 128:384]
    expected = amber.nm_compress(x, None, quantize, None)
    for part, wanted in zip(amber.nm_compress(moved, None, quantize, None), expected, strict=True):
        assert same_bits(part, wanted)


@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_the_norm_correction(device, tokens, channels, dtype, quantize):
    x, factor = activation(1, tokens, channels, dtype, False), factor_of(1, channels, False)
    plain = amber.nm_compress(x, factor, quantize, None)
    low = amber.nm_compress(x, factor, quantize, "norm")[2].double()
    actual = amber.nm_compress(x.to(device), factor.to(device), quantize, "norm")
    kept = amber.nm_select(x, factor, 2, 4).double()
    exact = (x.double().square().sum(-1) / kept.square().sum(-1)).sqrt()
    if quantize:
        exact = exact * plain[2].double()
    assert same_bits(actual[0], plain[0])
    assert same_bits(actual[1], plain[1])
    error = ((actual[2].cpu().double() - exact) / exact).abs().max()
    allowed = 2 * ((low - exact) / exact).abs().max() + (channels / CHAIN + 8) * FP32_ROUNDING
    assert error <= allowed


PATTERNS = [(2, 4), (1, 4), (4, 8), (8, 16), (1, 2), (3, 8), (16, 32), (4, 4)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (77, 448), (300, 3584), (129, 4096)])
def test_select_is_the_reference(device, tokens, channels, dtype, pattern):
    for special, prefix in itertools.product((False, True), (0, 5)):
        x = activation(tokens, tokens, channels, dtype, special)
        for factor in (None, factor_of(channels, channels, special)):
            expected = amber.nm_select(x, factor, *pattern, None, prefix)
            moved = None if factor is None else factor.to(device)
            assert same_bits(amber.nm_select(x.to(device), moved, *pattern, None, prefix), expected)


@pytest.mark.parametrize("correction", ["norm", "variance"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16)])
def test_corrected_selections(device, pattern, dtype, correction):
    x, factor = activation(2, 129, 2048, dtype, False), factor_of(2, 2048, False)
    low = amber.nm_select(x, factor, *pattern, correction).double()
    exact = amber.nm_select(x.double(), factor, *pattern, correction)
    kept = amber.nm_select(x, factor, *pattern) != 0
    actual = amber.nm_select(x.to(device), factor.to(device), *pattern, correction).cpu()
    assert torch.equal(actual != 0, kept)
    exact = torch.where(kept, exact, 0)
    agreed = ((exact != 0) == kept).all(-1)  # where fp64 breaks no tie of the scores another way
    error, allowed = (actual.double() - exact).abs(), 2 * (low - exact).abs().max()
    rounding = (torch.finfo(dtype).eps / 2 + (2048 / CHAIN + 8) * FP32_ROUNDING) * exact.abs()
    assert (error <= allowed + rounding)[agreed].all()
    assert agreed.sum() > len(agreed) // 2
