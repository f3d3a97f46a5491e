"""``torch.ops.amber.nm_compress``: its reference against NumPy, and what PyTorch sees of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels.nm_compress import nm_compress_reference
from amber_compile.kernels.nm_select import nm_select_reference
from amber_compile.kernels.two_four import EMPTY, expand, unpack_metadata

nm_compress = torch.ops.amber.nm_compress
DTYPES = [torch.bfloat16, torch.float16]
QUANTIZED = [None, "int8", "fp8"]
CORRECTIONS = [None, "norm"]
LIMITS = {"int8": 127, "fp8": 448}
NAN, INF = float("nan"), float("inf")
ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, INF, -INF, NAN, 1e-40, -1e-41, 6e-8, 3e38, 65504.0]
ODD_FACTORS = [0.0, 1.0, 1.0, 0.5, 2.0, -2.0, 3.0, 1e-38, 1e30, INF, NAN]


@pytest.fixture(autouse=True)
def quiet_numpy():
    with np.errstate(all="ignore"):
        yield


def sample(values, shape, dtype, seed):
    """Return a tensor of ``values`` drawn at random; what overflows becomes infinite."""
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.choice(values, shape), dtype=torch.float64).to(dtype)


def gaussian(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


# ---- the reference against NumPy -----------------------------------------------------------------


def kept_places(x, factor):
    """Return the places [tokens, K/4, 2] of the two best of each group, in order."""
    values = x.float().numpy()
    scores = np.abs(values if factor is None else values * factor.numpy())
    scores = scores.reshape(len(scores), -1, 4)
    best = np.lexsort((-np.where(np.isnan(scores), 0, scores), ~np.isnan(scores)))[..., :2]
    return np.sort(best, axis=-1)


def e4m3_values():
    """Return the finite numbers of e4m3 that are not negative, by their code."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    return np.where(exponent == 0, mantissa * 2.0**-9, normal)


def to_e4m3(values):
    """Return the codes of the nearest numbers of e4m3; of two, the one of the even code."""
    table, magnitude = e4m3_values(), np.abs(values).astype(np.float64)
    above = np.clip(np.searchsorted(table, magnitude), 1, 126)
    below = above - 1
    left, right = magnitude - table[below], table[above] - magnitude
    code = np.where((left < right) | ((left == right) & (below % 2 == 0)), below, above)
    return (code | np.signbit(values) * 128).astype(np.uint8)


def oracle(x, factor, quantize, smooth):
    """Return values, nibbles and scale of ``x`` [tokens, K], without a correction."""
    places = kept_places(x, factor)
    nibbles = (places[..., 0] | places[..., 1] << 2).astype(np.uint8)
    bits = np.take_along_axis(x.view(torch.int16).numpy().reshape(*nibbles.shape, 4), places, -1)
    values = torch.from_numpy(bits.reshape(len(x), -1)).view(x.dtype)
    if quantize is None:
        return values, nibbles, np.empty(0, np.float32)
    values, limit = values.float().numpy(), np.float32(LIMITS[quantize])
    if smooth is not None:
        of_all = np.broadcast_to(smooth.numpy().reshape(1, -1, 4), (*nibbles.shape, 4))
        values = values * np.take_along_axis(of_all, places, -1).reshape(len(x), -1)
    amax = np.abs(values).max(-1)
    scale = np.maximum(amax / limit, np.float32(2**-126))
    scaled = np.clip(values * (np.float32(1) / scale)[:, None], -limit, limit)
    scaled[~np.isfinite(amax)] = 0
    scale[~np.isfinite(amax)] = NAN
    assert scaled.dtype == scale.dtype == np.float32
    codes = np.rint(scaled).astype(np.int8) if quantize == "int8" else to_e4m3(scaled)
    return torch.from_numpy(codes), nibbles, scale


def check(x, factor, quantize, smooth=None):
    values, metadata, scale = nm_compress_reference(x, factor, quantize, None, smooth)
    expected, nibbles, expected_scale = oracle(x, factor, quantize, smooth)
    assert torch.equal(integers(values), integers(expected))
    assert unpack_metadata(metadata, len(x), 8 if quantize else 16).numpy().tolist() == (
        nibbles.tolist()
    )
    np.testing.assert_array_equal(scale.numpy(), expected_scale)


@settings(max_examples=80, deadline=None, database=None)
@given(
    dtype=st.sampled_from(DTYPES),
    quantize=st.sampled_from(QUANTIZED),
    tokens=st.integers(1, 20),
    blocks=st.integers(1, 4),
    weighted=st.booleans(),
    smoothed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_odd_values(dtype, quantize, tokens, blocks, weighted, smoothed, seed):
    x = sample(ODD_VALUES, (tokens, 64 * blocks), dtype, seed)
    x[::2] = gaussian(*x[::2].shape, dtype=dtype, seed=seed)  # rows with a finite scale
    factor = sample(ODD_FACTORS, 64 * blocks, torch.float32, seed + 1) if weighted else None
    smooth = sample(ODD_FACTORS, 64 * blocks, torch.float32, seed + 2)
    smooth[torch.rand(64 * blocks) < 0.9] = 1.5  # rows with a finite scale, again
    check(x, factor, quantize, smooth if smoothed and quantize else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("weighted", [False, True])
def test_ordinary_values(dtype, quantize, weighted):
    x, smooth = gaussian(33, 1088, dtype=dtype), gaussian(1088, dtype=torch.float32, seed=2)
    factor = gaussian(1088, dtype=torch.float32).abs() if weighted else None
    check(x, factor, quantize)
    if quantize:
        check(x, factor, quantize, smooth)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-38, 2**-126 * 100, 1e-30, 1e30, 3e38])
def test_rows_of_any_magnitude(quantize, magnitude):
    """Down to zeros, whose scale is the least one, no row needs an exception."""
    x = (torch.randn(4, 128) * magnitude).clamp(-3.3e38, 3.3e38).bfloat16()
    check(x, None, quantize)
    _, _, scale = nm_compress(x, None, quantize)
    assert (scale >= 2**-126).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_every_value_of_sixteen_bits_is_quantised(dtype, quantize):
    """Each finite value is kept, beside one that makes the row's scale reach a code's middle."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.zeros(1 << 10, 256, dtype=dtype)
    x.view(-1, 4)[:, 1] = every[every.float().abs().argsort()]
    x.view(-1, 4)[:, 2] = 1
    check(x, torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(64), quantize)


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_row_that_keeps_no_number_has_no_scale(quantize, odd):
    x = gaussian(3, 64)
    x[1, 5] = odd
    values, _, scale = nm_compress(x, None, quantize, "norm")
    assert scale.isnan().tolist() == [False, True, False]
    assert not values[1].view(torch.uint8).any()
    ignored = torch.ones(64)
    ignored[5] = -0.0 if odd != odd else 0.0  # 0 · infinity is NaN, which is kept
    assert nm_compress(x, ignored, quantize)[2].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_smoothing_changes_no_choice_and_no_correction(quantize):
    x, smooth = gaussian(9, 128), 4 * torch.rand(128) + 0.1
    _, metadata, scale = nm_compress(x, FACTOR, quantize, "norm", smooth)
    _, plain, plain_scale = nm_compress(x, FACTOR, quantize, "norm")
    assert torch.equal(metadata, plain)
    correction = plain_scale / nm_compress(x, FACTOR, quantize)[2]
    smoothed = nm_compress(x, FACTOR, quantize, None, smooth)[2]
    torch.testing.assert_close(scale / smoothed, correction, rtol=2**-22, atol=0)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_power_of_two_only_changes_the_scale(quantize):
    x = gaussian(9, 128)
    values, _, scale = nm_compress(x, FACTOR, quantize, "norm")
    same, _, fourfold = nm_compress(x, FACTOR, quantize, "norm", torch.full((128,), 4.0))
    assert torch.equal(integers(same), integers(values))
    assert torch.equal(fourfold, 4 * scale)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_value_that_smoothing_makes_infinite(quantize):
    x, smooth = torch.ones(2, 64).bfloat16(), torch.ones(64)
    x[0, 3], smooth[3] = 3e38, 2.0
    values, _, scale = nm_compress(x, None, quantize, None, smooth)
    assert scale.isnan().tolist() == [True, False]
    assert not values[0].view(torch.uint8).any()


# ---- what nm_select keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_expanded_it_is_the_selection(assert_same_bits, dtype, weighted):
    x = gaussian(2, 9, 192, dtype=dtype)
    factor = gaussian(192, dtype=torch.float32).abs() if weighted else None
    values, metadata, scale = nm_compress(x, factor)
    assert_same_bits(expand(values, metadata), nm_select_reference(x, factor, 2, 4).flatten(0, 1))
    assert scale.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_the_correction_is_that_of_the_selection(assert_same_bits, dtype, quantize):
    x = gaussian(19, 192, dtype=dtype)
    x[3], x[4, 5] = 0, INF
    values, metadata, scale = nm_compress(x, None, quantize, "norm")
    plain, same, quantum = nm_compress(x, None, quantize)
    assert_same_bits(metadata, same)
    assert torch.equal(integers(values), integers(plain))
    kept = nm_select_reference(x, None, 2, 4).float()
    correction = scale if quantize is None else scale / quantum
    corrected = kept * correction.nan_to_num(1)[:, None]
    one_rounding = nm_select_reference(x, None, 2, 4, "norm").float()
    rounding = torch.finfo(dtype).eps + 3 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(corrected, one_rounding, rtol=rounding, atol=0, equal_nan=True)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantised_values_are_near(quantize):
    x = gaussian(40, 256)
    values, metadata, scale = nm_compress(x, None, quantize)
    dense = expand(values, metadata).float() * scale[:, None]
    kept = nm_select_reference(x, None, 2, 4).float()
    half_a_step = torch.full_like(kept, 0.5) if quantize == "int8" else dense.abs() / 16
    bound = scale[:, None] * half_a_step if quantize == "int8" else half_a_step
    bound = bound + scale[:, None] * 2.0**-10 + kept.abs() * 2.0**-20
    assert ((dense - kept).abs() <= bound).all()


# ---- PyTorch -------------------------------------------------------------------------------------

X, FACTOR = gaussian(2, 5, 128), torch.rand(128) + 0.5


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[..., 1:65],
        lambda t: t[..., ::2],
        lambda t: t[:1, :1].expand(4, 3, -1),
        lambda t: t[:0],
        lambda t: t[0, 0],
    ],
    ids=["transposed", "odd", "steps", "expanded", "none", "vector"],
)
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_any_strides(assert_same_bits, view, quantize):
    x = view(gaussian(4, 6, 128))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    results = zip(nm_compress(x, None, quantize), nm_compress(rows, None, quantize), strict=True)
    for actual, expected in results:
        assert actual.is_contiguous()
        assert torch.equal(integers(actual), integers(expected))


def test_missing_rows_are_empty():
    _, metadata, _ = nm_compress(gaussian(17, 64), torch.full((64,), INF))
    assert (metadata[1].view(8, 4)[1:] == EMPTY).all()


@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_opcheck(quantize, correction):
    for x in (X, X.transpose(0, 1).half(), X[0, 0], X[:0]):
        smooth = FACTOR if quantize == "int8" else None
        arguments = (x, FACTOR, quantize, correction, smooth)
        torch.library.opcheck(torch.ops.amber.nm_compress.default, arguments)


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_one_graph_serves_all_token_counts(quantize):
    """Beyond one tile: PyTorch itself asks whether the metadata has a dimension of size 1."""

    def compressed(x):
        values, metadata, scale = nm_compress(x * 2, FACTOR, quantize, "norm")
        return values, metadata, scale * 2

    torch.compiler.reset()
    compiled = torch.compile(compressed, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"), torch.no_grad():
        for shape in ((2, 9), (2, 10), (7, 9), (5, 31)):
            x = gaussian(*shape, 128)
            for actual, expected in zip(compiled(x), compressed(x), strict=True):
                assert torch.equal(integers(actual), integers(expected))
            torch.compiler.set_stance("fail_on_recompile")


def test_a_gradient_is_refused():
    values, _, scale = nm_compress(X.clone().requires_grad_(), None, None, "norm")
    for result in (values, scale):
        with pytest.raises(RuntimeError, match="amber::nm_compress is for inference only"):
            result.sum().backward(retain_graph=True)


BAD_ARGUMENTS = {
    "x has 60 channels; valid: a multiple of 64": lambda x, f: nm_compress(x[..., :60], None),
    "x has 32 channels; valid: a multiple of 64": lambda x, f: nm_compress(x[..., :32], None),
    "x has 0 channels; valid: a multiple of 64": lambda x, f: nm_compress(x[..., :0], None),
    "x is a scalar": lambda x, f: nm_compress(x[0, 0, 0], None),
    "x has dtype torch.float32; valid for the compressed form: torch.bfloat16, torch.float16": (
        lambda x, f: nm_compress(x.float(), None)
    ),
    r"factor has shape \[64\]; valid: \[128\]": lambda x, f: nm_compress(x, f[:64]),
    "factor has dtype torch.float64; valid: torch.float32": lambda x, f: nm_compress(x, f.double()),
    "factor is on meta; valid: the device of x": lambda x, f: nm_compress(x, f.to("meta")),
    "unknown quantize 'int4'; .*valid: None, fp8, int8": lambda x, f: nm_compress(x, f, "int4"),
    "smooth is for what is quantised": lambda x, f: nm_compress(x, f, None, None, f),
    r"smooth has shape \[64\]; valid: \[128\]": (
        lambda x, f: nm_compress(x, f, "int8", None, f[:64])
    ),
    "smooth has dtype torch.float64": lambda x, f: nm_compress(x, f, "int8", None, f.double()),
    "smooth is on meta; valid: the device of x": (
        lambda x, f: nm_compress(x, f, "int8", None, f.to("meta"))
    ),
    "correction='variance' needs nm_select": lambda x, f: nm_compress(x, f, None, "variance"),
    "unknown correction 'nrom'; did you mean 'norm'": lambda x, f: nm_compress(x, f, None, "nrom"),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message):
    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](X, FACTOR)


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named_while_tracing(message):
    with FakeTensorMode() as mode, pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](mode.from_tensor(X), mode.from_tensor(FACTOR))
