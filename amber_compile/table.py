"""Lay out the sites of a report: a line for each, what is too long for its line as a note below.

    projection                          weight   input   how, or why not                kernel
    ─────────────────────────────────────────────────────────────────────────────────────────────
    model.layers.0.self_attn.qkv_proj   128x64   dense   [1]
    model.layers.0.self_attn.o_proj     64x64    dense   rule: o_proj stays dense
    model.layers.0.mlp.down_proj        64x96    2:4     weight_norm, norm correction   nm_select

    [1] rule: q is fused with k and v, which stay dense; list it in projections= to sparsify all
        three

Where quantisation was asked for, a column says in which format each product is computed, and a note
why not in eight bits. Names are never broken, so that they can be searched for and copied.
"""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .breaks import Break
    from .report import Site

WIDTH = 120
"""Columns of a table where no terminal says how many it has."""
LONGEST = 48
"""Characters of a reason that may stand in its line."""
GAP = 3
"""Columns between two cells."""

Row = dict[str, str]
HEADINGS = ("projection", "weight", "input", "format", "how, or why not", "kernel", "error")
FORMAT, HOW, KERNEL, ERROR = HEADINGS[3:]
OPTIONAL = (FORMAT, ERROR)
"""Columns that are left out where they are empty."""


def site_table(sites: Sequence[Site]) -> str:
    """Return ``sites`` as a table for people: as wide as the terminal, wider if names need it."""
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    rows = [_row(site) for site in sites]
    headings = [one for one in HEADINGS if one not in OPTIONAL or any(row[one] for row in rows)]
    notes = _shorten(rows, width, headings)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading == ERROR else "left")
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    out = io.StringIO()
    needed = sum(_wide(rows, heading) + GAP for heading in headings)
    Console(file=out, width=needed, markup=False, emoji=False, highlight=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*lines, "", *notes] if notes else lines)


def worst_list(sites: Sequence[Site]) -> str:
    """Return the errors of ``sites``, which come sorted, for people."""
    wide = max(len(site.name) for site in sites)
    rows = [f"  {site.error:8.4f}  {site.name:{wide}}  {_what(site)}" for site in sites]
    return "\n".join(["worst sites, by relative error ‖Y - Y'‖ / ‖Y‖", *rows])


def _what(site: Site) -> str:
    """Return what was done to a site whose error was measured."""
    return str(site.decision) if site.decision.sparse else f"dense; {site.format}"


def break_list(breaks: Sequence[Break]) -> str:
    """Return ``breaks`` for people: reason, then the user's line, of each."""
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    lines = ["graph breaks"]
    for number, one in enumerate(breaks, 1):
        reason = " ".join(one.reason.split())
        lines.append(textwrap.fill(f"  {number}. {reason}", width, subsequent_indent="     "))
        lines += [f"     {one.where}"] * bool(one.where)  # a path is never broken
    return "\n".join(lines)


def _row(site: Site) -> Row:
    settings, remark = site.decision.settings, site.decision.unquantized or site.smoothing
    cells = (
        site.name,
        "x".join(map(str, site.shape)),
        str(settings.pattern) if settings else "dense",
        f"{site.format}; {remark}" if remark else site.format,
        settings.how if settings else " ".join(str(site.decision.reason).split()),
        site.kernel,
        "" if site.error is None else f"{site.error:.4f}",
    )
    return dict(zip(HEADINGS, cells, strict=True))


def _shorten(rows: Sequence[Row], width: int, headings: Sequence[str]) -> list[str]:
    """Replace what does not fit into ``width`` by the number of a note; return the notes.

    What a kernel or a format lacks, behind a semicolon, is always a note.
    """
    notes: dict[str, int] = {}
    for row in rows:
        for heading in (FORMAT, KERNEL):
            shown, _, lacking = row[heading].partition("; ")
            if lacking:
                row[heading] = f"{shown} {_note(lacking, notes)}"
    others = sum(_wide(rows, heading) + GAP for heading in headings if heading != HOW)
    room = min(LONGEST, max(len(HOW), width - others))
    for row in rows:
        if len(row[HOW]) > room:
            row[HOW] = _note(row[HOW], notes)
    return [
        textwrap.fill(f"[{number}] {text}", width, subsequent_indent="    ")
        for text, number in notes.items()
    ]


def _wide(rows: Sequence[Row], heading: str) -> int:
    """Return the width of a column."""
    return max(len(heading), *(len(row[heading]) for row in rows))


def _note(text: str, notes: dict[str, int]) -> str:
    """Return the number of the note that says ``text``, the next one if none does."""
    return f"[{notes.setdefault(text, len(notes) + 1)}]"
