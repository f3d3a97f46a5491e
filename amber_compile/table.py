"""Lay out the sites of a report: a line for each, what is too long for its line as a note below.

    projection                          weight   input   how, or why not                kernel
    ─────────────────────────────────────────────────────────────────────────────────────────────
    model.layers.0.self_attn.qkv_proj   128x64   dense   [1]
    model.layers.0.self_attn.o_proj     64x64    dense   rule: o_proj stays dense
    model.layers.0.mlp.down_proj        64x96    2:4     weight_norm, norm correction   nm_select

    [1] rule: q is fused with k and v, which stay dense; list it in projections= to sparsify all
        three

Names are never broken, so that they can be searched for and copied.
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

Row = list[str]
HEADINGS: Row = ["projection", "weight", "input", "how, or why not", "kernel"]
HOW, KERNEL = 3, 4
"""The columns that may be cut down to a note."""


def site_table(sites: Sequence[Site]) -> str:
    """Return ``sites`` as a table for people: as wide as the terminal, wider if names need it."""
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    measured = any(site.error is not None for site in sites)
    headings = HEADINGS + ["error"] * measured
    rows = [_row(site)[: len(headings)] for site in sites]
    notes = _shorten(rows, width, headings)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading == "error" else "left")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    needed = sum(max(map(len, column)) + GAP for column in zip(headings, *rows, strict=True))
    Console(file=out, width=needed, markup=False, emoji=False, highlight=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*lines, "", *notes] if notes else lines)


def worst_list(sites: Sequence[Site]) -> str:
    """Return the errors of ``sites``, which come sorted, for people."""
    wide = max(len(site.name) for site in sites)
    rows = [f"  {site.error:8.4f}  {site.name:{wide}}  {site.decision}" for site in sites]
    return "\n".join(["worst sites, by relative error ‖Y - Y'‖ / ‖Y‖", *rows])


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
    settings = site.decision.settings
    return [
        site.name,
        "x".join(map(str, site.shape)),
        str(settings.pattern) if settings else "dense",
        settings.how if settings else " ".join(str(site.decision.reason).split()),
        site.kernel,
        "" if site.error is None else f"{site.error:.4f}",
    ]


def _shorten(rows: Sequence[Row], width: int, headings: Row) -> list[str]:
    """Replace what does not fit into ``width`` by the number of a note; return the notes.

    What a kernel lacks, behind a semicolon, is always a note.
    """
    notes: dict[str, int] = {}
    for row in rows:
        kernel, _, lacking = row[KERNEL].partition("; ")
        if lacking:
            row[KERNEL] = f"{kernel} {_note(lacking, notes)}"
    columns = list(zip(headings, *rows, strict=True))
    others = sum(max(map(len, column)) + GAP for column in columns[:HOW] + columns[HOW + 1 :])
    room = min(LONGEST, max(len(headings[HOW]), width - others))
    for row in rows:
        if len(row[HOW]) > room:
            row[HOW] = _note(row[HOW], notes)
    return [
        textwrap.fill(f"[{number}] {text}", width, subsequent_indent="    ")
        for text, number in notes.items()
    ]


def _note(text: str, notes: dict[str, int]) -> str:
    """Return the number of the note that says ``text``, the next one if none does."""
    return f"[{notes.setdefault(text, len(notes) + 1)}]"
