"""What is dropped has no gradient; what is kept has the one of a constant selection."""

import pytest
import torch

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.calibration.straight_through import straight_through


@pytest.mark.parametrize("correction", [None, "norm"])
def test_the_gradient_is_that_of_a_constant_selection(correction: str | None) -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.float64)

    def select(x):
        return torch.ops.amber.nm_select(x, None, 2, 4, correction)

    y = straight_through(x, select)
    assert torch.equal(y, select(x.detach()))
    (y * weight).sum().backward()
    slope = torch.where(y == 0, 0, y / x).detach()
    assert torch.equal(x.grad, weight * slope)
    assert int((x.grad == 0).sum()) == x.numel() // 2


def test_a_zero_that_is_kept_has_no_gradient_and_no_nan() -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    straight_through(x, lambda x: torch.ops.amber.nm_select(x, None, 2, 4)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 4))


def test_without_gradients_nothing_is_recorded() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with torch.no_grad():
        assert not straight_through(x, lambda x: x * 1).requires_grad
