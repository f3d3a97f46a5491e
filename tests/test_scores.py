"""The factors against their formulas in NumPy, which has exact percentiles."""

import numpy as np
import pytest
import torch

from amber_compile import scores
from amber_compile.errors import OptionError
from amber_compile.scores import SCORES, robust_norm, weight_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def weights(shape, dtype=torch.float32, seed=0):
    """Return weights whose tails are heavy enough for trimming to matter."""
    generator = torch.Generator().manual_seed(seed)
    normal, spread = (torch.randn(shape, generator=generator) for _ in range(2))
    return (normal * spread.exp() + 0.1).to(dtype)


def relative(norms):
    return norms / norms[norms > 0].min()


def plain(weight):
    return relative(np.linalg.norm(weight.double().numpy().reshape(-1, weight.shape[-1]), axis=0))


def robust(weight, reading="B"):
    values = weight.double().numpy().reshape(-1, weight.shape[-1])
    low, high = np.percentile(values, [0.5, 99.5])
    inside = (values >= low) & (values <= high)
    standard = (values - values[inside].mean()) / values[inside].std()
    return relative(np.linalg.norm(standard * (inside if reading == "B" else 1), axis=0))


def assert_factor(actual, expected):
    """Budget: everything is summed in float64, so that rounding to float32 is all the error."""
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=EPS, atol=0)


@pytest.fixture(params=[1 << 21, 100], ids=["one slice", "many slices"])
def slices(request, monkeypatch):
    monkeypatch.setattr(scores, "SLICE", request.param)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3), (200, 1), (40, 64), (201, 24), (3, 50, 8)])
def test_factors_are_the_formulas(dtype, shape):
    weight = weights(shape).to(dtype)
    assert_factor(weight_norm(weight), plain(weight))
    assert_factor(robust_norm(weight), robust(weight))
    assert_factor(robust_norm(weight, "A"), robust(weight, "A"))


def test_the_readings_differ():
    """Else the test above would show little: outliers sit in a few columns here."""
    weight = weights((64, 64))
    weight[:, :3] *= 50
    assert (robust_norm(weight)[:3] < weight_norm(weight)[:3] / 2).all()
    assert not torch.allclose(robust_norm(weight), robust_norm(weight, "A"))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 199, 200, 201, 202, 401, 1999])
@pytest.mark.parametrize("distinct", [1, 3, 10**6])
def test_percentiles_keep_what_interpolated_ones_keep(dtype, count, distinct):
    generator = torch.Generator().manual_seed(count)
    ranks = torch.randint(-distinct, distinct, (count, 1), generator=generator)
    values = (ranks * 1e-3).to(dtype)
    low, high = scores._percentiles(values)
    exact = np.percentile(values.double().numpy(), [0.5, 99.5])
    assert ((values >= low) == (values.double() >= exact[0])).all()
    assert ((values <= high) == (values.double() <= exact[1])).all()


def test_every_float32_keeps_its_order():
    values = torch.tensor([-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 1 + EPS, 3e38])
    order = scores._order(values)
    assert (order.diff() > 0).all()
    assert torch.equal(scores._flip_negative(order), values.view(torch.int32))


def test_a_transposed_weight_is_the_same_weight():
    weight = weights((40, 16))
    assert torch.equal(weight_norm(weight.T.contiguous().T), weight_norm(weight))
    assert torch.equal(robust_norm(weight.T.contiguous().T), robust_norm(weight))


@pytest.mark.parametrize("factor", [weight_norm, robust_norm])
def test_a_scaled_weight_has_the_same_factor(factor):
    weight = weights((40, 16))
    for scale in (2.0**60, 2.0**-60):  # squares of these leave float32
        assert torch.equal(factor(weight * scale), factor(weight))


@pytest.mark.parametrize("factor", [weight_norm, robust_norm])
def test_dead_channels_count_for_nothing_and_spoil_nothing(factor):
    weight = weights((400, 16))
    weight -= weight.mean()
    weight[:, 5] = 0
    result = factor(weight)
    assert result.isfinite().all()
    if factor is weight_norm:
        assert result[5] == 0
        assert torch.equal(result[:5], factor(weight[:, [0, 1, 2, 3, 4]]) * result[:5].min())


@pytest.mark.parametrize("factor", [weight_norm, robust_norm])
@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.ones(0, 8), torch.full((4, 8), 0.1)])
def test_a_weight_without_differences_prefers_no_channel(factor, weight):
    assert torch.equal(factor(weight), torch.ones(8))


def test_the_largest_factor_is_finite():
    weight = torch.tensor([[1e-45, 3e38]])
    assert weight_norm(weight).tolist() == [1.0, torch.finfo(torch.float32).max]


@pytest.mark.parametrize("factor", [weight_norm, robust_norm])
@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_an_error(factor, odd):
    weight = weights((400, 16))
    weight[7, 11] = odd
    with pytest.raises(OptionError, match=r"weight is not finite in 1 of 16 .* in channel 11"):
        factor(weight)


@pytest.mark.parametrize("factor", [weight_norm, robust_norm])
@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(4, 4).int(), torch.ones(1, 1, 1, 1)])
def test_what_is_no_weight_is_an_error(factor, weight):
    with pytest.raises(OptionError, match=r"weight is torch\..* \[.*\]; valid: floating point"):
        factor(weight)


def test_an_unknown_reading_is_an_error():
    with pytest.raises(OptionError, match="unknown reading 'C'; valid: A, B"):
        robust_norm(torch.ones(2, 2), "C")


def test_parameters_get_no_graph():
    weight = torch.nn.Parameter(weights((8, 4)))
    assert not weight_norm(weight).requires_grad
    assert not robust_norm(weight).requires_grad


def test_the_table_of_scores():
    assert {"magnitude": None, "weight_norm": weight_norm, "robust_norm": robust_norm} == SCORES
