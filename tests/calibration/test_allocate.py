"""Allocation: the true optimum of small problems, its bounds, ties, and what cannot be reached."""

import itertools
import math
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amber_compile.calibration import knapsack
from amber_compile.calibration.allocate import Allocation, Option, allocate, frontier
from amber_compile.calibration.knapsack import DENSE, Problem, relaxed
from amber_compile.errors import OptionError

errors = st.integers(-3, 12)  # whole numbers: their sums are exact
options = st.builds(Option, errors, st.integers(0, 6).map(lambda units: units * 64))
problems = st.lists(st.lists(options, max_size=3), min_size=1, max_size=5).map(
    lambda sites: {f"site {at}": own for at, own in enumerate(sites)}
)


def everything(sites):
    """Yield the error and macs of every choice there is."""
    for picks in itertools.product(*([DENSE, *own] for own in sites.values())):
        yield math.fsum(one.error for one in picks), sum(one.macs for one in picks)


def checked(found: Allocation, sites) -> tuple[float, int]:
    """Return what was found, after adding it up again."""
    assert all(option in sites[site] for site, option in found.chosen.items())
    assert found.error == math.fsum(one.error for one in found.chosen.values())
    assert found.macs == sum(one.macs for one in found.chosen.values())
    assert found.proven
    return found.error, found.macs


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(0, 30))
def test_the_most_macs_within_an_error(sites, budget):
    error, macs = checked(allocate(sites, 10_000, max_error=budget), sites)
    best = max((m, -e) for e, m in everything(sites) if e <= budget)
    assert (macs, -error) == best


@settings(max_examples=150, deadline=None)
@given(problems, st.floats(0, 1))
def test_the_least_error_at_a_coverage(sites, share):
    most = max(macs for _, macs in everything(sites))
    wanted = share * most / 10_000
    error, macs = checked(allocate(sites, 10_000, min_coverage=wanted), sites)
    least = min((e, -m) for e, m in everything(sites) if m >= wanted * 10_000 * (1 - 1e-12))
    assert (error, -macs) == least


@settings(max_examples=100, deadline=None)
@given(problems, st.integers(0, 30))
def test_the_optimum_lies_between_greedy_and_relaxed(sites, budget):
    above, below = relaxed(sites, budget)
    macs = allocate(sites, 10_000, max_error=budget).macs
    assert below <= macs <= above * (1 + 1e-12)


def large(layers: int, seed: int = 0) -> dict[str, list[Option]]:
    """Return a problem the size of a model, four options a site."""
    draw = random.Random(seed)
    found = {}
    for layer in range(layers):
        for name, macs in (("q", 16), ("k", 4), ("v", 4), ("o", 16), ("gate", 56), ("down", 56)):
            base = draw.lognormvariate(-6, 1)
            found[f"{layer}.{name}"] = [
                Option(base * draw.uniform(0.5, 1), macs << 20, how) for how in range(4)
            ]
    return found


TOTAL = 32 * 208 << 20


def test_a_large_problem_is_solved_to_the_end():
    sites = large(32)
    everything_sparse = sum(min(one.error for one in own) for own in sites.values())
    for share in (0.1, 0.3, 0.7):
        found = allocate(sites, TOTAL, max_error=share * everything_sparse)
        checked(found, sites)
        assert found.error <= share * everything_sparse
        above, below = relaxed(sites, share * everything_sparse)
        assert below <= found.macs <= above
        again = allocate(sites, TOTAL, min_coverage=found.coverage)
        assert (again.error, again.macs) == (found.error, found.macs)


def test_both_questions_agree_along_the_frontier():
    points = frontier(large(8), TOTAL, points=9)
    assert len(points) == 9
    assert points[0].macs == 0
    assert points[-1].macs == sum(own[0].macs for own in large(8).values())
    for lower, higher in itertools.pairwise(points):
        assert lower.error < higher.error
        assert lower.macs < higher.macs
        assert lower.coverage == lower.macs / TOTAL


# ---- ties ----


def test_a_tie_goes_to_the_earlier_sites_and_the_smaller_error():
    alike = {name: [Option(1.0, 64, "a"), Option(1.0, 64, "b")] for name in "xyz"}
    found = allocate(alike, 192, max_error=2.5)
    assert {site: one.choice for site, one in found.chosen.items()} == {"x": "a", "y": "a"}
    turned = allocate(dict(reversed(alike.items())), 192, max_error=2.5)
    assert list(turned.chosen) == ["z", "y"]
    cheaper = {**alike, "w": [Option(0.5, 64, "c")]}
    found = allocate(cheaper, 256, max_error=2.0)
    assert (found.macs, found.error) == (128, 1.5)
    assert list(found.chosen) == ["x", "w"]


def test_of_equal_errors_the_one_of_more_macs_is_taken():
    found = allocate({"x": [Option(1.0, 64)], "y": [Option(1.0, 128)]}, 192, min_coverage=0.2)
    assert (list(found.chosen), found.macs) == (["y"], 128)


def test_a_choice_that_helps_is_taken_without_being_asked_for():
    sites = {"x": [Option(-0.5, 64)], "y": [Option(0.0, 64)], "z": [Option(0.1, 64)]}
    found = allocate(sites, 192, min_coverage=0.0)
    assert (list(found.chosen), found.error) == (["x", "y"], -0.5)


def test_nothing_within_no_error():
    assert allocate({"x": [Option(0.1, 64)]}, 64, max_error=0.0).chosen == {}
    assert allocate({"x": []}, 64, max_error=0.0).chosen == {}
    assert allocate({}, 64, max_error=1.0).chosen == {}
    assert frontier({}, 64) == [Allocation({}, 0.0, 0, 0.0, proven=True)]


def test_rounding_in_a_sum_is_no_excess():
    tenths = {name: [Option(0.1, 64)] for name in "abcdef"}
    assert math.fsum([0.1] * 3) > 0.3
    assert allocate(tenths, 384, max_error=0.3).macs == 3 * 64


# ---- bounds of HiGHS ----


def test_what_is_above_the_bound_is_asked_for_again(monkeypatch):
    """As if HiGHS took its tolerance: the first answer is above the bound by a millionth."""
    sites = {"x": [Option(1.0 + 1e-6, 128)], "y": [Option(0.4, 64)], "z": [Option(1.5, 128)]}
    solve, bounds = Problem._solve, []

    def loose(self, cost, row, low, high):
        bounds.append(high)
        return solve(self, cost, row, low, high + 1e-5 * (len(bounds) == 1))

    monkeypatch.setattr(Problem, "_solve", loose)
    picks, proven = Problem(sites).most_macs(1.0)
    assert {site for site, one in picks.items() if one is not DENSE} == {"y"}
    assert len(bounds) == 2
    assert proven


def test_out_of_time_is_told_and_still_within_the_bound(monkeypatch):
    monkeypatch.setattr(knapsack, "LIMIT_S", 0.0)
    sites = large(8)
    found = allocate(sites, TOTAL, max_error=0.01)
    assert not found.proven
    assert found.error <= 0.01
    covering = allocate(sites, TOTAL, min_coverage=0.1)
    assert not covering.proven
    assert covering.coverage >= 0.1


# ---- what cannot be ----

ONE = {"x": [Option(0.25, 64), Option(0.5, 128)]}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, "give one of max_error=None and min_coverage=None, and only one"),
        ({"max_error": 1.0, "min_coverage": 0.1}, "give one of max_error=1.0 and min_coverage=0.1"),
        ({"max_error": -0.1}, "max_error=-0.1 cannot be met: the sites reach 0 and more"),
        ({"max_error": math.nan}, "max_error=nan cannot be met"),
        ({"min_coverage": 0.6}, r"min_coverage=0.6 cannot be reached: .* cover 0 to 0.5000 of"),
        ({"min_coverage": -0.1}, "min_coverage=-0.1 cannot be reached"),
        ({"min_coverage": math.nan}, "min_coverage=nan cannot be reached"),
    ],
)
def test_a_bound_that_cannot_be_met_names_the_reachable_range(bounds, message):
    with pytest.raises(OptionError, match=message):
        allocate(ONE, 256, **bounds)


@pytest.mark.parametrize("error", [math.nan, math.inf, -math.inf])
def test_an_error_that_is_no_number_names_its_site(error):
    with pytest.raises(OptionError, match=f"site 'x': error={error!r} must be finite"):
        allocate({"x": [Option(error, 64)]}, 64, max_error=1.0)
    with pytest.raises(OptionError, match="site 'x'"):
        frontier({"x": [Option(error, 64)]}, 64)


def test_macs_are_whole_numbers_and_no_more_than_the_model_has():
    with pytest.raises(OptionError, match=r"site 'x': macs=1\.5 must be a whole number >= 0"):
        allocate({"x": [Option(0.1, 1.5)]}, 64, max_error=1.0)
    with pytest.raises(OptionError, match="total=100 must be a whole number >= 128"):
        allocate(ONE, 100, max_error=1.0)
    with pytest.raises(OptionError, match="points=1 must be a whole number >= 2"):
        frontier(ONE, 256, points=1)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(OptionError, match=r"needs scipy: pip install 'amber-compile\[calibrate\]"):
        allocate(ONE, 256, max_error=0.3)
