"""Choose which sites are sparse, and how: the most multiply-accumulates at a bounded total error.

    maximise  Σ macs(choice of s)      so that  Σ error(choice of s) ≤ max_error
    minimise  Σ error(choice of s)     so that  Σ macs(choice of s) ≥ min_coverage · total

Every site s takes one of its options or stays dense, which costs and brings nothing: a
multiple-choice knapsack (knapsack.py), solved to its proven optimum by HiGHS (scipy.optimize.milp).
Errors are taken as additive over sites; what they measure is the caller's to say, and they may be
negative.

Of several optima the one that is better in the other number wins; among sites whose options are the
same in numbers, the earlier ones get the larger choices. So the result does not depend on chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from amber_compile.calibration.knapsack import (
    DENSE,
    Option,
    Picks,
    Problem,
    Sites,
    error_of,
    macs_of,
)
from amber_compile.errors import OptionError, whole_number

__all__ = ["Allocation", "Option", "allocate", "frontier"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for every site.

    Attributes:
        chosen: the option of each site that is not dense, in the order of the sites.
        error: total.
        macs: total.
        coverage: ``macs`` as a share of all that the model has, 0 to 1.
        proven: whether it is known to be the optimum; not if HiGHS ran out of time.
    """

    chosen: Mapping[str, Option]
    error: float
    macs: int
    coverage: float
    proven: bool


def allocate(
    sites: Sites,
    total: int,
    *,
    max_error: float | None = None,
    min_coverage: float | None = None,
) -> Allocation:
    """Return the best choice for every site under one of the two bounds.

    Args:
        sites: the options of each site; being dense is always one, and not listed.
        total: multiply-accumulates of the whole model, those that cannot be sparse included.
        max_error: the largest total error; as many multiply-accumulates as possible are sparse.
        min_coverage: share of ``total`` to make sparse, 0 to 1, at the smallest total error.

    Raises:
        OptionError: if not exactly one bound is given, it cannot be met, an error is not finite, or
            scipy is not installed.
    """
    _check(sites, total)
    problem = Problem(sites)
    if max_error is not None and min_coverage is None:
        return _most_macs(problem, max_error, total)
    if max_error is not None or min_coverage is None:
        raise OptionError(
            f"give one of max_error={max_error!r} and min_coverage={min_coverage!r}, and only one"
        )
    most = problem.most()
    if not 0 <= min_coverage <= most / total:
        raise OptionError(
            f"min_coverage={min_coverage!r} cannot be reached: the sites cover 0 to "
            f"{most / total:.4f} of the multiply-accumulates"
        )
    share = total * min_coverage  # may be off by rounding
    return _least_error(problem, min(most, math.ceil(share * (1 - 2**-50))), total)


def frontier(sites: Sites, total: int, points: int = 24) -> list[Allocation]:
    """Return the least errors for evenly spaced coverages from none to all, for a plot.

    Raises:
        OptionError: as :func:`allocate`.
    """
    _check(sites, total)
    problem = Problem(sites)
    most, last = problem.most(), whole_number("points", points, 2) - 1
    found = [_least_error(problem, most * step // last, total) for step in range(last + 1)]
    return list({one.macs: one for one in found}.values())


def _most_macs(problem: Problem, max_error: float, total: int) -> Allocation:
    least = problem.least_error()
    if not max_error >= least:  # NaN is none either
        raise OptionError(
            f"max_error={max_error!r} cannot be met: the sites reach {least:.4g} and more"
        )
    picks, proven = problem.most_macs(max_error)
    better, also = problem.least_error_at(macs_of(picks.values()))
    return _allocation(problem, better if also else picks, total, proven)


def _least_error(problem: Problem, macs: int, total: int) -> Allocation:
    picks, proven = problem.least_error_at(macs)
    better, also = problem.most_macs(error_of(picks.values()))
    return _allocation(problem, better if also else picks, total, proven)


def _settled(problem: Problem, picks: Picks) -> Picks:
    """Give the larger of the choices of sites that are alike to those that come first."""
    alike: dict[tuple[tuple[float, int], ...], list[str]] = {}
    for site, options in problem.useful.items():
        alike.setdefault(tuple((one.error, one.macs) for one in options), []).append(site)
    settled: Picks = {}
    for sites in alike.values():
        places = sorted((problem.useful[site].index(picks[site]) for site in sites), reverse=True)
        settled |= {site: problem.useful[site][at] for site, at in zip(sites, places, strict=True)}
    return settled


def _allocation(problem: Problem, picks: Picks, total: int, proven: bool) -> Allocation:
    settled = _settled(problem, picks)
    chosen = {site: settled[site] for site in problem.useful if settled[site] is not DENSE}
    macs = macs_of(chosen.values())
    return Allocation(chosen, error_of(chosen.values()), macs, macs / total, proven)


def _check(sites: Sites, total: int) -> None:
    """Refuse what is no problem: errors that are no numbers, more to be sparse than there is."""
    for site, options in sites.items():
        for option in options:
            if not math.isfinite(option.error):
                raise OptionError(f"site {site!r}: error={option.error!r} must be finite")
            whole_number(f"site {site!r}: macs", option.macs, 0)
    most = sum(max((one.macs for one in options), default=0) for options in sites.values())
    whole_number("total", total, max(1, most))
