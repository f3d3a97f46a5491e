"""How much is sparse: the knapsack's bound, moved until the whole model's damage is as asked.

The damages of single sites add up only roughly, so what the knapsack chose is run together, on
held-out text, and the bound of the knapsack follows what was measured:

    bound  ←  bound · wanted / measured          between one that was too much and one that was not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from amber_compile.calibration.allocate import allocate

from .choosing import Choice
from .errors import CalibrationError
from .validation import Distance

Choices = Mapping[str, Sequence[Choice]]
Chosen = dict[str, Choice]
RUNS, PICKS = 6, 24
"""Runs of the whole model in search of a bound, and of the knapsack."""
FINE = 0.02
"""Bounds this close to each other, as a share, are not told apart."""
SMALLEST = 1e-12
_INFINITE = float("inf")
CLOSE = 0.9
"""A measured damage of so much of what is wanted is close to it."""


@dataclass(frozen=True)
class Settled:
    """The sites that are sparse, and what they cost together.

    Attributes:
        chosen: a choice for each sparse site.
        measured: damage of the whole model on held-out text.
        wanted: the bound it had to keep, if there was one.
    """

    chosen: Chosen
    measured: Distance
    wanted: float | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token that are sparse."""
        return sum(choice.macs for choice in self.chosen.values())


def at_most(
    choices: Choices,
    total: int,
    wanted: float,
    measure: Callable[[Chosen], Distance],
    start: float | None = None,
    close: float = CLOSE,
) -> Settled:
    """Return the choice of most macs whose measured damage is at most ``wanted``.

    Args:
        choices: ways of each site.
        total: macs of the whole model.
        wanted: the bound.
        measure: damage of the whole model under a choice.
        start: the first bound of the knapsack; ``wanted`` if not given.
        close: a measured damage of so much of what is wanted ends the search.
    """
    low, high, bound = 0.0, _INFINITE, wanted if start is None else start
    best = Settled({}, Distance(0.0, 0.0), wanted)
    known: list[tuple[Chosen, Distance]] = []
    for _ in range(PICKS):
        chosen = pick(choices, total, max_error=bound)
        measured = next((one for held, one in known if held == chosen), None)
        if measured is None:
            if len(known) == RUNS:
                break
            measured = measure(chosen)
            known.append((chosen, measured))
        alone = sum(choice.measured.damage for choice in chosen.values())
        if measured.mean > wanted:
            high = alone  # less than this leaves out a site at least
        else:
            best = max(best, Settled(chosen, measured, wanted), key=lambda one: one.macs)
            low = bound
            if measured.mean >= close * wanted or bound >= _largest(choices):
                break
        if high < _INFINITE and high - low <= FINE * high:
            break
        bound = _next(alone * wanted / max(measured.mean, SMALLEST), bound, low, high)
    return best


def pick(
    choices: Choices,
    total: int,
    *,
    max_error: float | None = None,
    coverage: float | None = None,
) -> Chosen:
    """Return what the knapsack chooses."""
    sites = {name: [choice.option for choice in own] for name, own in choices.items()}
    found = allocate(sites, total, max_error=max_error, min_coverage=coverage)
    return {name: option.choice for name, option in found.chosen.items()}


def covering(
    choices: Choices, total: int, coverage: float, measure: Callable[[Chosen], Distance]
) -> Settled:
    """Return the choice of least damage that makes ``coverage`` of all macs sparse.

    Raises:
        CalibrationError: if the sites do not add up to that.
    """
    most = sum(max(choice.macs for choice in own) for own in choices.values()) / total
    if coverage > most:
        raise CalibrationError(
            f"coverage={coverage!r} cannot be reached: the projections that can be sparse hold "
            f"{most:.4f} of the multiply-accumulates"
        )
    chosen = pick(choices, total, coverage=coverage)
    return Settled(chosen, measure(chosen))


def _largest(choices: Choices) -> float:
    return sum(max(choice.measured.damage for choice in own) for own in choices.values())


def _next(aimed: float, bound: float, low: float, high: float) -> float:
    """Return the bound to try next: by what was measured, if that is between what is known."""
    if low < aimed < high:
        return aimed
    return (low + high) / 2 if high < _INFINITE else 2 * max(bound, SMALLEST)
