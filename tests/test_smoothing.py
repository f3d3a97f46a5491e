"""Smooth vectors: the formulas, and that a product does not change."""

import pytest
import torch

from amber_compile.errors import OptionError
from amber_compile.smoothing import LARGEST, smooth_vector

ABSMAX = torch.tensor([1.0, 8.0, 0.5, 2.0])
WEIGHT_MAX = torch.tensor([0.25, 1.0, 2.0, 0.5])


def test_smoothquant():
    v = smooth_vector(ABSMAX, WEIGHT_MAX, "smoothquant", 0.5)
    expected = (WEIGHT_MAX / ABSMAX).sqrt()  # 1 / s
    torch.testing.assert_close(v, expected / expected.log().mean().exp())


def test_outstanding_is_its_inverse():
    for alpha in (0.1, 0.5):
        one = smooth_vector(ABSMAX, WEIGHT_MAX, "smoothquant", alpha)
        other = smooth_vector(ABSMAX, WEIGHT_MAX, "outstanding", alpha)
        torch.testing.assert_close(one * other, torch.ones(4))


def test_with_alpha_1_smoothquant_levels_the_activations():
    v = smooth_vector(ABSMAX, WEIGHT_MAX, "smoothquant", 1.0)
    levelled = ABSMAX * v
    torch.testing.assert_close(levelled, levelled[:1].expand(4))


def test_the_product_stays_what_it_was():
    x, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    v = smooth_vector(x.abs().amax(0), w.abs().amax(0), "outstanding", 0.1).double()
    torch.testing.assert_close((x * v) @ (w / v).T, x @ w.T)


def test_channels_that_nothing_uses_are_left_alone():
    v = smooth_vector(torch.tensor([0.0, 1, 4]), torch.tensor([1.0, 0, 1]), "smoothquant", 0.5)
    assert v.tolist() == [1.0, 1.0, 1.0]  # one channel is used: its geometric mean is itself


def test_no_channel_is_moved_further_than_the_limit():
    v = smooth_vector(torch.tensor([1e-30, 1.0, 1e30]), torch.ones(3), "outstanding", 1.0)
    assert v.tolist() == [1 / LARGEST, 1.0, LARGEST]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ABSMAX, WEIGHT_MAX, "smooth", 0.5), "unknown smooth 'smooth'"),
        ((ABSMAX, WEIGHT_MAX[:3], "outstanding", 0.5), r"absmax has shape \[4\], weight_max"),
        ((ABSMAX * torch.inf, WEIGHT_MAX, "outstanding", 0.5), "must be finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(OptionError, match=message):
        smooth_vector(*arguments)
