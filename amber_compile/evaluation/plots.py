"""Draw what sparsity costs. Needs matplotlib.

    frontier([Point("paper", "2:4", 0.58, 0.158, 0.004), ...], "frontier.png")
    heat_map({"model.layers.0.self_attn.q_proj": 0.13, ...}, "sensitivity.svg")

The ending of the path says the format; without a path nothing is written. Pictures are drawn on
nothing, to be shown on a white page and on a black one (cost/plot_style.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amber_compile.cost.plot_style import (
    DENSE,
    INK,
    SPARSE,
    Path,
    new_figure,
    save,
    style,
    write,
)
from amber_compile.errors import OptionError
from amber_compile.rule import layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (DENSE, SPARSE, "#2f9e62", "#a05fc0", "#b8860b", "#c2466b", "#2b9aa8", "#7a7f2a")
MARKERS = "osD^vPX*"
ASIDE = 4.0
"""Points of a length by which methods stand apart where they cover the same."""
LEGIBLE = 4
"""Characters of an error that is written into its field."""
SCALE = ("#e8eef7", "#f3c9ac", SPARSE, "#7a2f04")
"""Of a heat map, from no error to the largest."""


@dataclass(frozen=True)
class Point:
    """What one setting costs, and how much it covers.

    Attributes:
        method: what the points of one colour have in common, such as ``"paper"``.
        pattern: what those of one marker have, such as ``"2:4"``.
        coverage: share of the linear MACs, 0 to 1.
        error: such as the difference in loss, or KL.
        deviation: its standard error.
    """

    method: str
    pattern: str
    coverage: float
    error: float
    deviation: float | None = None


def frontier(
    points: Sequence[Point],
    path: Path | None = None,
    *,
    measure: str = "ΔNLL, nats a token",
    title: str = "What coverage costs",
) -> Figure:
    """Draw error against coverage: a colour for each method, a marker for each pattern.

    Points of one method and pattern are joined. The faint band joins the best: no other point
    covers as much at a smaller error.

    Args:
        points: at least one, with finite values.
        path: where to save the figure, as ``.svg`` or ``.png``.
        measure: what the error is, in words.
        title: of the figure.

    Raises:
        OptionError: if no point has finite values.
        ImportError: if matplotlib is not installed.
    """
    shown = [one for one in points if math.isfinite(one.coverage) and math.isfinite(one.error)]
    if not shown:
        raise OptionError("points= holds none with a finite coverage and error: nothing to draw")
    methods, patterns = (list(dict.fromkeys(names)) for names in _names(shown))
    with style():
        figure = new_figure(title, 7.5, 4.4)
        axes = figure.subplots()
        axes.plot(*zip(*_best(shown), strict=True), color=INK, linewidth=7, alpha=0.16)
        for (method, pattern), line in _lines(shown).items():
            colour = COLOURS[methods.index(method) % len(COLOURS)]
            marker = MARKERS[patterns.index(pattern) % len(MARKERS)]
            aside = ASIDE * (methods.index(method) - (len(methods) - 1) / 2)
            _draw_line(axes, line, colour, marker, aside)
        axes.set(xlabel="linear MACs covered", ylabel=measure, ylim=(0, None))
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.margins(x=0.08)
        _legends(axes, methods, patterns)
        save(figure, path)
    return figure


def heat_map(
    sensitivities: Mapping[str, float],
    path: Path | None = None,
    *,
    measure: str = "relative output error",
    title: str = "Sensitivity of each projection",
) -> Figure:
    """Draw the error of each projection: a row for each layer, a column for each projection.

    Args:
        sensitivities: qualified name of a projection -> its error; one that is not finite is left
            blank, with a question mark.
        path: where to save the figure, as ``.svg`` or ``.png``.
        measure: what the error is, in words.
        title: of the figure.

    Raises:
        OptionError: if no error is finite.
        ImportError: if matplotlib is not installed.
    """
    known = [error for error in sensitivities.values() if math.isfinite(error)]
    if not known:
        raise OptionError("sensitivities= holds no finite error: nothing to draw")
    rows, columns, fields = _fields(sensitivities)
    with style():
        from matplotlib.colors import LinearSegmentedColormap

        figure = new_figure(title, 2.6 + 0.75 * len(columns), 1.6 + 0.24 * len(rows))
        axes = figure.subplots()
        values = [[fields.get((row, column), math.nan) for column in columns] for row in rows]
        colours = LinearSegmentedColormap.from_list("sensitivity", SCALE)
        top = max(known)
        image = axes.imshow(values, colours, aspect="auto", vmin=0, vmax=top or 1)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), ["none" if row is None else str(row) for row in rows])
        axes.set_ylabel("layer")
        axes.grid(False)
        for (row, column), error in fields.items():
            _label(axes, (columns.index(column), rows.index(row)), error, top)
        figure.colorbar(image, ax=axes, label=measure)
        save(figure, path)
    return figure


# ---- points --------------------------------------------------------------------------------------


def _names(points: Sequence[Point]) -> tuple[list[str], list[str]]:
    return [one.method for one in points], [one.pattern for one in points]


def _lines(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Return the points of each method and pattern, by coverage."""
    found: dict[tuple[str, str], list[Point]] = {}
    for one in sorted(points, key=lambda one: one.coverage):
        found.setdefault((one.method, one.pattern), []).append(one)
    return found


def _best(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return coverage and error of the points that no other one beats in both, by coverage."""
    best: list[tuple[float, float]] = []
    for one in sorted(points, key=lambda one: (-one.coverage, one.error)):
        if not best or one.error < best[-1][1]:
            best.append((one.coverage, one.error))
    return best[::-1]


def _draw_line(axes: Axes, line: Sequence[Point], colour: str, marker: str, aside: float) -> None:
    """Draw the points of a method and pattern, so many dots aside: their bars stay apart."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    across, errors = [one.coverage for one in line], [one.error for one in line]
    spread = [one.deviation or 0.0 for one in line]
    drawn = axes.errorbar(
        across, errors, spread, color=colour, marker=marker, linewidth=1.2, elinewidth=1, capsize=2
    )
    shift = ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans)
    for artist in drawn.get_children():
        artist.set_transform(artist.get_transform() + shift)


def _legends(axes: Axes, methods: Sequence[str], patterns: Sequence[str]) -> None:
    """Say what colours and markers mean, beside the axes."""
    from matplotlib.lines import Line2D

    colours = [
        Line2D([], [], color=COLOURS[at % len(COLOURS)], label=method)
        for at, method in enumerate(methods)
    ]
    markers = [
        Line2D([], [], color=INK, marker=MARKERS[at % len(MARKERS)], linestyle="", label=pattern)
        for at, pattern in enumerate(patterns)
    ]
    axes.legend(handles=[*colours, *markers], loc="upper left", bbox_to_anchor=(1.01, 1))


# ---- fields --------------------------------------------------------------------------------------


def _fields(
    sensitivities: Mapping[str, float],
) -> tuple[list[int | None], list[str], dict[tuple[int | None, str], float]]:
    """Return the rows, the columns, and the error in each field."""
    paths = {name: _within_layer(name) for name in sensitivities}
    short = {path: path.rpartition(".")[2] for path in paths.values()}
    twice = {end for end in short.values() if list(short.values()).count(end) > 1}
    columns = {path: path if end in twice else end for path, end in short.items()}
    fields = {
        (layer_of(name), columns[paths[name]]): error for name, error in sensitivities.items()
    }
    layers = {row for row, _ in fields}
    rows = [*sorted(row for row in layers if row is not None), *([None] if None in layers else [])]
    return rows, list(dict.fromkeys(columns.values())), fields


def _within_layer(name: str) -> str:
    """Return what of a name stands behind the layer's number."""
    layer = layer_of(name)
    return name if layer is None else name.partition(f"{layer}.")[2] or name


def _label(axes: Axes, place: tuple[int, int], error: float, top: float) -> None:
    """Write an error into its field, dark on light and light on dark."""
    if not math.isfinite(error):
        write(axes, "?", place, (0, 0), ha="center", va="center")
        return
    text = f"{error:.3f}".removeprefix("0")[: LEGIBLE + 1] if error < 10 else f"{error:.0f}"
    colour = "white" if error > 0.6 * top else "#222222"
    write(axes, text, place, (0, 0), ha="center", va="center", color=colour, fontsize=7.5)
