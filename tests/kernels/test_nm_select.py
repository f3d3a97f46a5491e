"""Which channels are kept, by either implementation, against an oracle that sorts in Python."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATTERNS = [(1, 2), (2, 4), (3, 4), (4, 8), (8, 16), (1, 32), (16, 32), (31, 32)]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
NAN, INF = float("nan"), float("inf")
ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, INF, -INF, NAN, 1e-40, -1e-41, 6e-8, 3e38, 65504.0]
ODD_FACTORS = [0.0, 1.0, 1.0, 0.5, 2.0, -2.0, 3.0, 1e-38, 1e30, INF, NAN]


def oracle(x, factor, n, m):
    """Return what the N best of every M channels of ``x`` leave, one group after the other."""
    values = x.double().numpy() if x.dtype == torch.float64 else x.float().numpy()
    with np.errstate(all="ignore"):
        scores = np.abs(values if factor is None else values * factor.numpy())
    keep = np.zeros(scores.shape, bool)
    for *token, first in np.ndindex(*scores.shape[:-1], scores.shape[-1] // m):
        group = slice(first * m, first * m + m)
        ranking = sorted(place(score, c) for c, score in enumerate(scores[*token, group]))
        keep[*token, group][[channel for *_, channel in ranking[:n]]] = True
    return torch.where(torch.from_numpy(keep), x, torch.zeros((), dtype=x.dtype))


def place(score, channel):
    """Return what sorts better channels first."""
    return (0, 0.0, channel) if np.isnan(score) else (1, -score, channel)


def sample(values, shape, dtype, seed):
    """Return a tensor of ``values`` drawn at random; what overflows becomes infinite."""
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.choice(values, shape), dtype=torch.float64).to(dtype)


@settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(PATTERNS),
    tokens=st.integers(1, 3),
    groups=st.integers(1, 20),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_keeps_what_the_oracle_keeps(
    select, assert_same_bits, dtype, pattern, tokens, groups, weighted, seed
):
    n, m = pattern
    x = sample(ODD_VALUES, (tokens, groups * m), dtype, seed)
    factor = sample(ODD_FACTORS, groups * m, torch.float32, seed + 1) if weighted else None
    assert_same_bits(select(x, factor, n, m), oracle(x, factor, n, m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_keeps_what_the_oracle_keeps_of_ordinary_values(select, assert_same_bits, n, m, dtype):
    generator = torch.Generator().manual_seed(m + n)
    x = torch.randn(3, 5, 192, generator=generator).to(dtype)
    factor = torch.rand(192, generator=generator) + 0.5
    assert_same_bits(select(x, None, n, m), oracle(x, None, n, m))
    assert_same_bits(select(x, factor, n, m), oracle(x, factor, n, m))


def test_float64_is_scored_in_float64(assert_same_bits):
    x = torch.tensor([1.0, 1.0 + 2**-52, 1.0, 1e-320], dtype=torch.float64)
    x = torch.cat([x, sample(ODD_VALUES, 60, torch.float64, 0)])
    factor = sample(ODD_FACTORS, 64, torch.float32, 1)
    for f in (None, factor):
        assert_same_bits(torch.ops.amber.nm_select(x, f, 2, 4), oracle(x, f, 2, 4))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_value_of_sixteen_bits(select, assert_same_bits, dtype, weighted):
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = every[torch.randperm(1 << 16, generator=generator)].view(dtype).view(64, 1024)
    factor = torch.rand(1024, generator=generator) if weighted else None
    assert_same_bits(select(x, factor, 2, 4), oracle(x, factor, 2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "kept"),
    [
        ([1, 1, 1, 1], [1, 1, 0, 0]),  # the lower channel wins a tie
        ([0, 2, -2, 2], [0, 2, -2, 0]),  # whatever its sign
        ([-0.0, 0.0, 0.0, -0.0], [-0.0, 0.0, 0.0, 0.0]),  # -0 = +0; dropped zeros are +0
        ([INF, NAN, 5, -INF], [INF, NAN, 0, 0]),  # NaN above inf above finite
        ([NAN, INF, NAN, NAN], [NAN, 0, NAN, 0]),  # all NaN alike
        ([3, 4, 1, 2], [3, 4, 0, 0]),
    ],
)
def test_ranking(select, assert_same_bits, group, kept, dtype):
    assert_same_bits(
        select(torch.tensor(group, dtype=dtype), None, 2, 4), torch.tensor(kept, dtype=dtype)
    )


def test_nan_payloads_and_signs_rank_alike(select, assert_same_bits):
    x = torch.tensor([0x7F800001, -1, 0x7FFFFFFF, 0x7FC00000], dtype=torch.int32)
    x = x.view(torch.float32)
    expected = torch.cat([x[:2].view(torch.int32), torch.zeros(2, dtype=torch.int32)])
    assert_same_bits(select(x, None, 2, 4), expected.view(torch.float32))


def test_the_score_is_rounded_to_float32(select, assert_same_bits):
    """In float64 the second score is larger by less than float32 tells; so the first one wins."""
    x = torch.tensor([1.0, 1.0])
    factor = torch.tensor([1.0, 1.0 + 2**-23])
    assert_same_bits(select(x, factor, 1, 2), torch.tensor([0.0, 1.0]))
    x = torch.tensor([1.0, 1.0 + 2**-23])
    factor = torch.tensor([1.0 + 2**-22, 1.0 + 2**-23])  # products 1 + 2**-22 (+ 2**-46)
    assert_same_bits(select(x, factor, 1, 2), torch.tensor([1.0, 0.0]))


def test_the_factor_only_selects(select, assert_same_bits):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    factor = torch.tensor([-100.0, 1.0, 1.0, 1.0])  # its sign has no meaning
    assert_same_bits(select(x, factor, 2, 4), torch.tensor([[1.0, 0.0, 0.0, 4.0]]))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t.permute(2, 0, 1, 3),
        lambda t: t[..., 8:40],
        lambda t: t[..., 1::2][..., :16],
        lambda t: t[:1, :1].expand(4, 3, -1, -1),
        lambda t: t[0, 0, 0, 1:65],  # an address that no register divides
        lambda t: t.transpose(-1, -2)[..., :4],
        lambda t: t[:0],
        lambda t: t[..., :0],
    ],
    ids=["transposed", "permuted", "columns", "steps", "expanded", "odd", "rows", "none", "empty"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(assert_same_bits, view, dtype):
    x = view(torch.randn(4, 3, 8, 80).to(dtype))
    y = torch.ops.amber.nm_select(x, None, 2, 4)
    assert y.is_contiguous()
    assert_same_bits(y, oracle(x.contiguous(), None, 2, 4))


@pytest.mark.parametrize("channels", [2, 6, 30, 34, 62, 66, 1 << 17])
def test_any_number_of_channels(select, assert_same_bits, channels):
    x = torch.randn(2, channels).bfloat16()
    factor = torch.rand(channels)
    assert_same_bits(select(x, factor, 1, 2), oracle(x, factor, 1, 2))
