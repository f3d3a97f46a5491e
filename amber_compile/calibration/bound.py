"""The most work at a bound on the damage, counting what refining takes off it.

knapsack at  bound / EXPECTED    ->  refine  ->  measured damage
above the bound                  ->  leave out sites until it is not: what was tuned stays
well below it                    ->  knapsack at the bound over the share that was left, once
"""

from __future__ import annotations

from dataclasses import replace

from .allocation import CLOSE, Choices, Chosen, Settled, at_most
from .choosing import Choice
from .refining import Measure, Refining

EXPECTED = {"output": 0.65, "weight": 0.45}
"""What refining usually leaves of the damage, with one weight and with two
(docs/calibration.md)."""

ROUGH = 0.75
"""How close to its aim the choice is that will be refined: what that takes off is a guess."""


def most_below(
    wanted: float, choices: Choices, total: int, measure: Measure, refine: Refining
) -> Settled:
    """Return the sites of most macs whose damage together is at most ``wanted``, refined."""
    allowed = [share for name, share in EXPECTED.items() if refine.options.allows(name)]
    refines, aim = bool(allowed), wanted / min([1.0, *allowed])
    before = at_most(choices, total, aim, measure, close=ROUGH if refines else CLOSE)
    settled = _shrunk(refine(before, "first"), wanted, total, measure)
    room = settled.measured.mean < CLOSE * wanted and len(settled.chosen) < len(choices)
    if not (refines and room and settled.chosen):
        return replace(settled, wanted=wanted)
    left = settled.measured.mean / max(before.measured.mean, 1e-12)
    more = at_most(
        _with(choices, settled.chosen), total, wanted / max(left, 0.1), measure, close=ROUGH
    )
    second = _shrunk(refine(more, "second", 0.5), wanted, total, measure)
    best = max(settled, second, key=lambda one: (one.macs, -one.measured.mean))
    return replace(best, wanted=wanted)


def _shrunk(settled: Settled, wanted: float, total: int, measure: Measure) -> Settled:
    """Return ``settled`` without the sites that are too much."""
    if settled.measured.mean <= wanted:
        return settled
    own = {name: [choice] for name, choice in settled.chosen.items()}
    alone = sum(choice.measured.damage for choice in settled.chosen.values())
    start = alone * wanted / settled.measured.mean
    return at_most(own, total, wanted, measure, start)


def _with(choices: Choices, chosen: Chosen) -> dict[str, list[Choice]]:
    """Return ``choices`` with the refined ways in the place of those they came from."""
    return {
        name: [
            chosen[name] if name in chosen and one.macs == chosen[name].macs else one for one in own
        ]
        for name, own in choices.items()
    }
