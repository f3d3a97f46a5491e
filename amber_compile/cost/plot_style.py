"""How the pictures look: drawn on nothing, in colours that suit a white page and a black one.

A picture in a README or a report is shown in either scheme, and cannot know in which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]
INK, FAINT = "#727a84", "#727a8440"
DENSE, SPARSE = "#4c86d8", "#d9580d"
"""Ink, dense and sparse stand out from white and from GitHub's black by a contrast above 3.4."""

Place = tuple[float, float]
Side = Literal[-1, 1]
"""Below or above."""
DOTS_PER_INCH = 150
LETTER, LINE = 5.5, 11.0
"""Width of a letter and height of a line, about, in points."""
LEADER = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
"""From a place to a text far off."""
STYLE: Any = {  # matplotlib's own type of it differs between versions
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "amber",  # the same picture is the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in our style inside.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as cause:
        raise ImportError("plots need matplotlib: pip install 'amber-compile[inspect]'") from cause
    with rc_context(STYLE):
        yield


def new_figure(title: str, width: float, height: float) -> Figure:
    """Return an empty figure, in inches; no window and no global state belongs to it."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=11)
    return figure


def add_legend(figure: Figure, axes: Axes) -> None:
    """Explain the lines of ``axes`` that have a label, at the upper right of ``figure``."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, loc="upper right", ncols=len(entries), borderaxespad=0)


def plain_ticks(axis: Axis, steps: tuple[float, ...] = (1.0,)) -> None:
    """Write 0.01, 1, 1k at a logarithmic axis, at every power of ten times ``steps``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """Return ``value`` in few characters: ``0.01``, ``250``, ``16k``."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def write(axes: Axes, text: str, at: Place, off: Place, **how: Any) -> None:
    """Write ``text`` at a place of ``axes``, so many points off."""
    axes.annotate(text, at, off, textcoords="offset points", **how)


def write_beside(axes: Axes, labels: Sequence[tuple[Place, str, Side]]) -> None:
    """Write at each place its text, as far off as others leave room.

    Above it ends there, below it begins there: so it keeps clear of a line that rises.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout settles
    taken: list[tuple[float, float, float]] = []  # middle, height, half a width: in points
    for place, text, side in sorted(labels, key=lambda label: -label[2] * label[0][1]):
        x, y = axes.transData.transform(place) * 72 / figure.dpi
        half, off = LETTER * len(text) / 2, LINE
        x -= side * (half - LETTER)
        while any(abs(x - u) < half + w and abs(y + side * off - v) < LINE for u, v, w in taken):
            off += LINE / 2
        taken.append((x, y + side * off, half))
        how = {"ha": "right" if side > 0 else "left", "va": "center"}
        far = LEADER if off > LINE else None
        write(axes, text, place, (side * LETTER, side * off), arrowprops=far, **how)


def save(figure: Figure, path: Path | None) -> None:
    """Write ``figure`` to ``path``, if there is one; its ending says the format."""
    if path is not None:
        dated = {"Date": None} if os.fspath(path).lower().endswith(".svg") else {}
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata=dated)
