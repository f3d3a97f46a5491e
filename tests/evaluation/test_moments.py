"""Means and their errors, from sums."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amber_compile.evaluation.moments import Mean


def mean_of(windows: list[list[float]]) -> Mean:
    found = Mean()
    for window in windows:  # one at a time: how they are dealt out makes no difference
        found.add(torch.tensor([sum(window)]), torch.tensor([len(window)]))
    return found


def test_of_equal_windows_it_is_the_mean_of_their_means_and_its_error():
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    found = mean_of(values.tolist())
    assert found.windows == 7
    assert found.tokens == 35
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(float(values.mean(1).std() / 7**0.5), rel=1e-5)


WINDOWS = st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=2, max_size=8)


@given(WINDOWS)
def test_of_unequal_windows_it_is_the_ratio_estimator(windows: list[list[float]]):
    found = mean_of(windows)
    tokens = [value for window in windows for value in window]
    mean = math.fsum(tokens) / len(tokens)
    spread = math.fsum((sum(window) - len(window) * mean) ** 2 for window in windows)
    expected = math.sqrt(spread * len(windows) / (len(windows) - 1)) / len(tokens)
    assert found.mean == pytest.approx(mean, rel=1e-5, abs=1e-5)
    assert found.error == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_batches_of_windows_add_up():
    sums, tokens = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([2, 3, 5])
    whole, parts = Mean(), Mean()
    whole.add(sums, tokens)
    for part in (slice(0, 1), slice(1, 3)):
        parts.add(sums[part], tokens[part])
    assert vars(whole) == vars(parts)


@pytest.mark.parametrize(
    ("windows", "mean", "error"),
    [([], math.nan, None), ([[2.0]], 2.0, None), ([[1.0], [math.nan]], math.nan, math.nan)],
)
def test_what_is_not_known(windows: list[list[float]], mean: float, error: Any):
    found = mean_of(windows)
    assert [found.mean, found.error] == pytest.approx([mean, error], nan_ok=True)


def test_it_holds_numbers_only():
    found = mean_of([[1.0, 2.0]] * 100)
    assert {type(value) for value in vars(found).values()} == {int, float}
