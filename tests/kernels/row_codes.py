"""What the tests of int8 codes share: codes as NumPy makes them, inputs, equality."""

import shutil

import numpy as np
import pytest
import torch

from amber_compile.kernels import compilation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CORRECTIONS = ["norm", "variance"]
NAN, INF = float("nan"), float("inf")
EPS = torch.finfo(torch.float32).eps
has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compilation.COMPILERS)), reason="waits for a C++ compiler"
)


def oracle(kept, smooth):
    """Return int8 codes and scale of the rows of ``kept``, by NumPy."""
    with np.errstate(all="ignore"):
        values = kept.float().numpy() * (np.float32(1) if smooth is None else smooth.numpy())
        largest = np.abs(values).max(-1, keepdims=True)
        scale = np.maximum(largest / np.float32(127), np.float32(2**-126))
        codes = np.rint(np.clip(values * (np.float32(1) / scale), -127, 127))
        codes[~np.isfinite(largest[..., 0])] = 0
        scale[~np.isfinite(largest)] = NAN
    assert values.dtype == scale.dtype == np.float32
    return torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(scale)[..., 0]


def check(actual, expected):
    """Codes and scales are the same; one NaN is like another."""
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (each.float() if each.dtype.itemsize == 1 else each for each in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def sample(values, shape, dtype, seed):
    """Return a tensor of ``values`` drawn at random; what overflows becomes infinite."""
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.choice(values, shape), dtype=torch.float64).to(dtype)


def gaussian(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positive(channels, seed=1):
    return torch.rand(channels, generator=torch.Generator().manual_seed(seed)) + 0.5


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)
