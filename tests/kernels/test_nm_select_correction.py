"""What scales the kept values, by either implementation, against the formula in float64."""

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CORRECTIONS = ["norm", "variance"]
INF, NAN = float("inf"), float("nan")


def energy(x, correction):
    return x.var(-1, correction=0, keepdim=True) if correction == "variance" else norm(x)


def norm(x):
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]


def formula(x, kept, correction, dtype):
    """Return the scale per token, computed in ``dtype`` by other means than the operator's."""
    before, after = (energy(value.to(dtype), correction) for value in (x, kept))
    return ((before + 1e-30) / (after + 1e-30)).sqrt().double()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (7, 36), (3, 5, 512), (2, 4100), (1, 1 << 17)])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_scales_within_the_error_budget(select, correction, dtype, shape, mean):
    """Budget: twice the scale's error in plain float32, and one rounding to float32, one to x."""
    generator = torch.Generator().manual_seed(shape[-1])
    x = (torch.randn(shape, generator=generator) * 3 + mean).to(dtype)
    factor = torch.rand(shape[-1], generator=generator) + 0.5
    kept = select(x, factor, 2, 4)
    scale, plain = (formula(x, kept, correction, d) for d in (torch.float64, torch.float32))
    relative = 2 * (plain - scale).abs().max() / scale.abs().min()
    rounding = torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
    exact = kept.double() * scale
    budget = exact.abs() * (relative + rounding)
    assert ((select(x, factor, 2, 4, correction).double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_kept(select, dtype):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    corrected = norm(select(x, None, 2, 4, "norm").double())
    uncorrected = norm(select(x, None, 2, 4).double())
    assert (uncorrected < 0.95 * norm(x.double())).all()
    rounding = torch.finfo(dtype).eps + 256 * torch.finfo(torch.float32).eps  # values, sums of 256
    torch.testing.assert_close(corrected, norm(x.double()), rtol=rounding, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_is_rounded_to_nearest_even(select, assert_same_bits, dtype):
    """A token of four equal values is scaled by the root of 2, but for ε, without other errors."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    x = values[:, None].expand(-1, 4)
    squares = values.float().square()
    scale = ((squares * 4 / 4 + 1e-30) / (squares * 2 / 4 + 1e-30)).sqrt()
    scale = scale.where(scale.isfinite(), 1)
    y = (values.float() * scale).to(dtype)[:, None] * torch.tensor([1, 1, 0, 0], dtype=dtype)
    actual = select(x, None, 2, 4, "norm")
    assert_same_bits(actual[:, :2], y[:, :2])
    assert not actual[:, 2:].view(torch.int16).any()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [INF, -INF, NAN])
def test_a_token_that_is_not_finite_is_not_corrected(
    select, assert_same_bits, correction, dtype, odd
):
    x = torch.randn(3, 64).to(dtype)
    x[1, 17] = odd
    y = select(x, None, 2, 4, correction)
    torch.testing.assert_close(y[1], select(x[1], None, 2, 4), rtol=0, atol=0, equal_nan=True)
    assert (y[0] != select(x[0], None, 2, 4)).any()  # its neighbours are corrected
    assert_same_bits(y[2], select(x[2], None, 2, 4, correction))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_token_whose_squares_overflow_is_not_corrected(select, assert_same_bits, correction):
    x = torch.tensor([[1e20, -2e20, 3e20, 4e20]])
    assert_same_bits(select(x, None, 2, 4, correction), torch.tensor([[0.0, 0.0, 3e20, 4e20]]))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(select, assert_same_bits, correction, dtype):
    zeros = torch.zeros(2, 32, dtype=dtype)
    assert_same_bits(select(zeros, None, 2, 4, correction), zeros)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_vanishing_token_is_not_corrected(select, assert_same_bits, correction):
    x = torch.tensor([[1e-30, -2e-30, 3e-30, 4e-30]])
    assert_same_bits(select(x, None, 2, 4, correction), torch.tensor([[0.0, 0.0, 3e-30, 4e-30]]))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_dropped_means_nothing_scaled(assert_same_bits, correction, dtype):
    x = torch.randn(5, 64).to(dtype)
    x[3, 3] = NAN
    assert_same_bits(torch.ops.amber.nm_select(x, None, 4, 4, correction), x)
    x = torch.tensor([[5.0, 0, 0, -7]], dtype=dtype)
    assert_same_bits(torch.ops.amber.nm_select(x, None, 2, 4, correction), x)


@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(assert_same_bits, correction, dtype):
    x = torch.randn(300, 1024).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.ops.amber.nm_select(x, None, 2, 4, correction)
        torch.set_num_threads(3)
        assert_same_bits(torch.ops.amber.nm_select(x, None, 2, 4, correction), alone)
    finally:
        torch.set_num_threads(threads)
