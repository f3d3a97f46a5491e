"""Lay out what a model costs: a line for projections that are alike, and one formula in full.

    Cost on H100 SXM, bfloat16: sparse is 1.15 times as fast at 2048 tokens, and faster from 345
    tokens on

    projections   count   input   kernels                from T   T=512   T=2048   share
    ────────────────────────────────────────────────────────────────────────────────────
    q 4096x4096      27   2:4     compress, 2:4 matmul      482   1.01x    1.12x     7 %
    k 1024x4096      32   dense   matmul                                             2 %

``from T``: the least token count from which sparse is faster; ``T=512``: how many times faster at
512 tokens; ``share``: of the time of all counted projections, dense, at the middle of these T.
"""

from __future__ import annotations

import io
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from sympy import Expr, Max, expand

if TYPE_CHECKING:
    from .model import ModelCost, SiteCost
    from .work import Comparison

WIDTH = 120
"""Columns of the text where no terminal says how many it has."""
GAP = 3
"""Columns between two cells."""
MICRO = 1_000_000
LEFT = ("projections", "input", "kernels")
"""Columns of words; the others are numbers, and stand at the right of their cells."""

Row = list[str]


def cost_table(cost: ModelCost, tokens: Sequence[int]) -> str:
    """Return ``cost`` as text for people, with speed-ups at ``tokens``."""
    middle = tokens[len(tokens) // 2]
    headings = ["projections", "count", "input", "kernels", "from T"]
    headings += [f"T={count}" for count in tokens] + ["share"]
    whole = cost.dense.at(middle)["seconds"]
    rows = [_row(group, tokens, middle, whole) for group in cost.groups]
    count = sum(len(group.sites) for group in cost.groups if group.counted)
    rows.append(["all counted", str(count), "", "", *_gains(cost, tokens), "100 %"])
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    source = textwrap.fill(f"Rates: {cost.rates.source}.", width)
    parts = [_title(cost, middle), source, _lay_out(headings, rows), _formulas(cost, middle)]
    return "\n\n".join(part for part in parts if part)


def readable(seconds: Expr) -> str:
    """Return a time as text, in µs: ``max(0.0424·T, 0.00551·T + 11.2) + 3``."""
    inside = seconds.replace(Max, lambda *each: Max(*(MICRO * one for one in each)) / MICRO)
    text = str(expand(MICRO * inside).evalf(15)).replace("*", "·")
    text = re.sub(r"\bM(ax|in)\b", r"m\1", text)
    return re.sub(r"\b\d[\d.]*(e[+-]?\d+)?", lambda number: _short(float(number[0])), text)


def _short(number: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{float(f'{number:.3g}'):.9f}".rstrip("0").rstrip(".")


def _title(cost: ModelCost, middle: int) -> str:
    start = f"Cost on {cost.rates.name}, {cost.dtype}:"
    if not any(group.changed for group in cost.groups):
        return f"{start} every projection is dense"
    least = "no token count" if cost.break_even is None else f"{cost.break_even} tokens"
    gain = f"{cost.speedup(middle):.2f} times as fast at {middle} tokens"
    return f"{start} sparse is {gain}, and faster from {least} on"


def _row(group: SiteCost, tokens: Sequence[int], middle: int, whole: float) -> Row:
    share = group.dense.at(middle)["seconds"] / whole if group.counted and whole else None
    return [
        group.label,
        str(len(group.sites)),
        str(group.settings.pattern) if group.settings else "dense",
        ", ".join(kernel.name for kernel, _ in group.one.sparse.kernels),
        *(_gains(group, tokens) if group.changed else [""] * (1 + len(tokens))),
        "not counted" if share is None else f"{share:.0%}".replace("%", " %"),
    ]


def _gains(both: Comparison, tokens: Sequence[int]) -> Row:
    least = both.break_even
    return ["never" if least is None else str(least)] + [
        f"{both.speedup(count):.2f}x" for count in tokens
    ]


def _lay_out(headings: Row, rows: Sequence[Row]) -> str:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="left" if heading in LEFT else "right")
    for at, row in enumerate(rows):
        table.add_row(*row, end_section=at + 2 == len(rows))
    out = io.StringIO()
    needed = sum(max(map(len, column)) + GAP for column in zip(headings, *rows, strict=True))
    Console(file=out, width=needed, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _formulas(cost: ModelCost, middle: int) -> str:
    """Return the times of the sparse projections that take longest."""
    sparse = [group for group in cost.groups if group.changed and group.counted]
    if not sparse:
        return ""
    group = max(sparse, key=lambda group: group.dense.at(middle)["seconds"])
    return (
        f"One {group.label} in µs, of T tokens:\n"
        f"  dense    {readable(group.one.dense.seconds)}\n"
        f"  sparse   {readable(group.one.sparse.seconds)}"
    )
