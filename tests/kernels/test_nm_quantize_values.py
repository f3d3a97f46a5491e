"""What ``nm_quantize`` makes of NaN, infinities, zeros and numbers that vanish, and corrections."""

import pytest
import torch
from row_codes import CORRECTIONS, DTYPES, EPS, INF, NAN, check, gaussian, oracle, positive

from amber_compile.kernels.nm_select import nm_select_reference

# ---- values without a code -----------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [(2, 4), (8, 16), (4, 4)])
@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_keeps_no_number_has_no_scale(quantize, dtype, odd, correction, pattern):
    x = gaussian(3, 64, dtype=dtype)
    x[1, 17] = odd
    codes, scale = quantize(x, None, None, *pattern, correction)
    assert scale.isnan().tolist() == [False, True, False]
    assert codes.any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
@pytest.mark.parametrize(("odd", "weight"), [(INF, INF), (INF, NAN), (NAN, NAN)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_kept_may_be_anything(quantize, dtype, odd, weight, correction):
    """The lower two of a group have the same score, or a better one, by their factor."""
    x, factor = gaussian(2, 64, dtype=dtype), torch.ones(64)
    x[0, 4:8] = torch.tensor([1.0, 2.0, odd, 3.0])
    factor[4:6] = weight
    kept = nm_select_reference(x, factor, 2, 4)
    assert kept[0, 4:8].tolist() == [1, 2, 0, 0]
    (codes, scale), (right, first) = quantize(x, factor, None, 2, 4, correction), oracle(kept, None)
    assert torch.equal(codes, right)
    assert scale[0] == first[0]  # a correction that is not finite is 1


@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_the_least_scale(quantize, dtype, correction):
    x = torch.zeros(3, 64, dtype=dtype)
    x[1] = -0.0
    codes, scale = quantize(x, None, None, 2, 4, correction)
    assert not codes.any()
    assert scale.tolist() == [2.0**-126] * 3


@pytest.mark.parametrize("pattern", [(2, 4), (4, 4)])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 2.0**-127, 2.0**-126 * 126, 1e-30, 3e38])
def test_tokens_of_any_magnitude(quantize, magnitude, pattern):
    """What underflows has the least scale, so that values up to half of it have code 0."""
    x = (gaussian(4, 128, dtype=torch.float32) * magnitude).clamp(-3.3e38, 3.3e38)
    codes, scale = quantize(x, None, None, *pattern)
    check((codes, scale), oracle(nm_select_reference(x, None, *pattern), None))
    assert (scale >= 2.0**-126).all()
    assert codes.any() == (magnitude > 1e-40)


@pytest.mark.parametrize("pattern", [(2, 4), (8, 16), (4, 4)])
def test_smoothing_multiplies_as_numbers_do(quantize, pattern):
    """A zero silences its channel; what is not finite spoils every token."""
    x, smooth = gaussian(3, 64), positive(64)
    smooth[5] = 0.0
    codes, scale = quantize(x, None, smooth, *pattern)
    assert not codes[:, 5].any()
    assert scale.isfinite().all()
    for odd in (INF, NAN):
        smooth[5] = odd
        codes, scale = quantize(x, None, smooth, *pattern)
        assert scale.isnan().all()
        assert not codes.any()


# ---- correction ----------------------------------------------------------------------------------


def correction_in(dtype, x, kept, correction):
    """Return the factor per token, computed in ``dtype`` by other means than the operator's."""

    def energy(values):
        if correction == "variance":
            return values.to(dtype).var(-1, correction=0)
        return torch.linalg.vector_norm(values.to(dtype), dim=-1).square() / values.shape[-1]

    return ((energy(x) + 1e-30) / (energy(kept) + 1e-30)).sqrt().double()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (7, 36), (3, 5, 512), (2, 4160), (1, 1 << 17)])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_a_correction_scales_the_scale(quantize, correction, dtype, shape, mean):
    """Budget: twice the factor's error in plain float32, and what rounding may add.

    Half an EPS each: two energies, two sums with ε and their quotient, halved by the root; the root
    and its product with the scale.
    """
    x = (gaussian(*shape, dtype=torch.float32) * 3 + mean).to(dtype)
    factor, smooth = positive(shape[-1]), positive(shape[-1], 2)
    kept = nm_select_reference(x, factor, 2, 4)
    codes, scale = quantize(x, factor, smooth, 2, 4, correction)
    plain_codes, plain_scale = quantize(x, factor, smooth, 2, 4)
    assert torch.equal(codes, plain_codes)
    right, plain = (correction_in(d, x, kept, correction) for d in (torch.float64, torch.float32))
    relative = 2 * (plain - right).abs().max() / right.abs().min()
    exact = plain_scale.double() * right
    assert ((scale.double() - exact).abs() <= exact * (relative + (5 / 2 + 2) * EPS / 2)).all()


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_squares_that_overflow_or_vanish_correct_nothing(quantize, correction, pattern):
    values = torch.tensor([1e20, -2e20, 3e20, 4e20]).repeat(16)
    for x in (values[None], values[None] * 1e-50):
        check(quantize(x, None, None, *pattern, correction), quantize(x, None, None, *pattern))


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (4, 4)])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_dropped_means_nothing_corrected(quantize, dtype, correction, pattern):
    x = gaussian(3, 1088, dtype=dtype)
    x.view(-1, 4)[:, 1:3] = 0
    check(quantize(x, None, None, *pattern, correction), quantize(x, None, None, *pattern))
