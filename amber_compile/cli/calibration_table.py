"""Show a calibration to people: a line for each projection, then what it comes to.

projection                        share   error    damage   decided
───────────────────────────────────────────────────────────────────────────────────────────
model.layers.0.self_attn.q_proj    0.9%   0.2702   0.00136  2:4, calibrated, norm correction
model.layers.0.mlp.gate_proj       2.7%   0.4325   0.09810  dense: its damage is not worth its share
"""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table

from amber_compile.calibration import Calibration

WIDTH = 200
"""No line is broken: names and reasons can be searched for."""


def described(made: Calibration) -> str:
    """Return the table and the sums."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("projection", "share", "error", "damage", "decided"):
        right = heading in ("share", "error", "damage")
        table.add_column(heading, no_wrap=True, justify="right" if right else "left")
    for name in made.candidates.sites:
        table.add_row(*_row(made, name))
    out = io.StringIO()
    Console(file=out, width=WIDTH, markup=False, emoji=False, highlight=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*lines, "", *_sums(made)])


def _row(made: Calibration, name: str) -> tuple[str, ...]:
    planned = made.plan.sites[name]
    ways = made.choices.get(name, [])
    share = made.candidates.macs([name]) / made.candidates.total if ways else 0.0
    decided = f"dense: {planned.choice}" if isinstance(planned.choice, str) else str(planned.choice)
    if planned.quantization:
        decided += f"; {planned.quantization}"
    if not ways:
        return name, "", "", "", decided
    best = min((way.measured for way in ways), key=lambda one: one.damage)
    return name, f"{share:.1%}", f"{best.error:.4f}", f"{best.damage:.5f}", decided


def _sums(made: Calibration) -> list[str]:
    measured = made.settled.measured
    lines = [
        f"{len(made.settled.chosen)} of {len(made.plan.sites)} projections sparse, "
        f"{made.coverage:.1%} of the linear multiply-accumulates",
        f"damage of the whole on held-out text: {measured} a token",
    ]
    if made.settled.wanted is not None:
        lines[-1] += f"; bound {made.settled.wanted:.4f}"
    if made.paper is not None:
        lines.append(f"the paper's rule and score, on the same text: {made.paper:.4f}")
    second = made.plan.made["second weights"]
    lines.append(f"second weights for prefill: {second}; calibrated in {made.seconds:.0f} s")
    return lines
