"""The multiple-choice knapsack: one option for every site, as a mixed-integer program for HiGHS.

    Problem(sites).most_macs(error)         the most macs of a total error of at most ``error``
    Problem(sites).least_error_at(macs)     the least total error of at least ``macs``
    relaxed(sites, error)                   bounds of the former, without a solver

Options that another one of the site beats in both numbers are left out; what is left rises in both.
HiGHS meets a bound to about a millionth of the largest error. A choice that is above it by more
than rounding is refused, and asked for again under a bound lower by as much.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amber_compile.errors import OptionError

LIMIT_S = 60.0
"""Seconds that HiGHS may take for one problem; the best found until then is returned."""
ROUNDING = 1e-9
"""By how much of the largest error a total may be above its bound: 3 x 0.1 is within 0.3."""
FINE = 1e6
"""HiGHS stops 1e-6 from the optimum: of a millionth of the largest error, then."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a site.

    Attributes:
        error: what it adds to the total.
        macs: how many multiply-accumulates it makes sparse.
        choice: what it stands for; the caller's.
    """

    error: float
    macs: int
    choice: Any = None


DENSE = Option(0.0, 0)


Sites = Mapping[str, Sequence[Option]]
Picks = dict[str, Option]


class Problem:
    """The knapsack as a mixed-integer program: one 0/1 variable an option, the useful ones only."""

    def __init__(self, sites: Sites) -> None:
        self.useful = {site: _useful(options) for site, options in sites.items()}
        self.variables = [(site, one) for site, own in self.useful.items() for one in own]
        self._unit = math.gcd(*(option.macs for _, option in self.variables)) or 1
        largest = max((abs(option.error) for _, option in self.variables), default=0.0)
        self._scale = largest or 1.0

    def least_error(self) -> float:
        """Return the smallest total error of all choices."""
        return math.fsum(options[0].error for options in self.useful.values())

    def most(self) -> int:
        """Return the largest number of multiply-accumulates of all choices."""
        return sum(options[-1].macs for options in self.useful.values())

    def most_macs(self, max_error: float) -> tuple[Picks, bool]:
        """Return the choice of the most macs whose error is at most ``max_error``."""
        all_ = {site: options[-1] for site, options in self.useful.items()}
        if self._within(all_, max_error):
            return all_, True
        bound = max_error
        while True:
            found = self._solve(-self._macs(), self._errors(), -math.inf, bound / self._scale)
            if found is None:  # no time for anything
                return {site: options[0] for site, options in self.useful.items()}, False
            if self._within(found[0], max_error):
                return found
            above = error_of(found[0].values()) - max_error
            bound -= max(above, 1e-7 * self._scale)

    def least_error_at(self, macs: int) -> tuple[Picks, bool]:
        """Return the choice of the least error that has at least ``macs``."""
        least = {site: options[0] for site, options in self.useful.items()}
        if macs_of(least.values()) >= macs:
            return least, True
        needed = math.ceil(macs / self._unit)
        found = self._solve(FINE * self._errors(), self._macs(), needed - 0.5, math.inf)
        return found or ({site: options[-1] for site, options in self.useful.items()}, False)

    def _within(self, picks: Picks, max_error: float) -> bool:
        return error_of(picks.values()) <= max_error + ROUNDING * self._scale

    def _errors(self) -> Any:
        numpy = importlib.import_module("numpy")
        return numpy.array([option.error / self._scale for _, option in self.variables])

    def _macs(self) -> Any:
        numpy = importlib.import_module("numpy")
        return numpy.array([float(option.macs // self._unit) for _, option in self.variables])

    def _solve(self, cost: Any, row: Any, low: float, high: float) -> tuple[Picks, bool] | None:
        """Return the choice of least ``cost`` with ``low`` ≤ its sum of ``row`` ≤ ``high``."""
        optimize = _scipy()
        numbers = {site: at for at, site in enumerate(self.useful)}
        places = [numbers[site] for site, _ in self.variables]
        ones, columns = [1.0] * len(places), range(len(places))
        each = importlib.import_module("scipy.sparse").csr_array((ones, (places, columns)))
        one_each = optimize.LinearConstraint(each, 1, 1)
        result = optimize.milp(
            cost,
            integrality=[1] * len(places),
            bounds=optimize.Bounds(0, 1),
            constraints=[one_each, optimize.LinearConstraint(row, low, high)],
            options={"mip_rel_gap": 0.0, "time_limit": LIMIT_S},
        )
        if result.x is None:
            return None
        chosen = [one for one, share in zip(self.variables, result.x, strict=True) if share > 0.5]
        return dict(chosen), result.status == 0


def relaxed(sites: Sites, max_error: float) -> tuple[float, int]:
    """Bound the multiply-accumulates at ``max_error``: (no choice has more, some choice has these).

    Steps along the convex hulls of the sites, by falling macs per error, are taken while the error
    allows; a share of the step that does not fit is the optimum of the relaxed problem.
    """
    steps: list[tuple[float, int]] = []
    macs, left = 0, max_error
    for options in sites.values():
        hull = _hull(_useful(options))
        macs, left = macs + hull[0].macs, left - hull[0].error
        steps += [(b.error - a.error, b.macs - a.macs) for a, b in itertools.pairwise(hull)]
    for error, more in sorted(steps, key=lambda step: step[0] / step[1]):
        if error > left:
            return macs + more * max(0.0, left) / error, macs
        macs, left = macs + more, left - error
    return float(macs), macs


def error_of(options: Iterable[Option]) -> float:
    """Return the total error of ``options``, rounded once."""
    return math.fsum(option.error for option in options)


def macs_of(options: Iterable[Option]) -> int:
    """Return the total multiply-accumulates of ``options``."""
    return sum(option.macs for option in options)


def _useful(options: Sequence[Option]) -> list[Option]:
    """Return the options, dense among them, that no other beats, by rising error and macs."""
    kept: list[Option] = []
    for option in sorted([DENSE, *options], key=lambda one: (one.error, -one.macs)):
        if not kept or option.macs > kept[-1].macs:
            kept.append(option)
    return kept


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options whose steps bring less and less per error."""
    hull: list[Option] = []
    for c in options:
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b.macs - a.macs) * (c.error - b.error) > (c.macs - b.macs) * (b.error - a.error):
                break
            hull.pop()
        hull.append(c)
    return hull


def _scipy() -> Any:
    try:
        return importlib.import_module("scipy.optimize")
    except ImportError as cause:
        raise OptionError(
            "allocation needs scipy: pip install 'amber-compile[calibrate]'"
        ) from cause
