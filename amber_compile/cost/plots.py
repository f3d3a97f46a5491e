"""Draw what a model costs: time against tokens, and the roofline. Needs matplotlib.

    plot_time(cost, "time.svg")                         dense and sparse, break-even marked
    plot_roofline(cost, "roofline.png", tokens=2048)    rate against arithmetic intensity

The ending of the path says the format; without a path nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from sympy import Expr, lambdify

from amber_compile.errors import OptionError, whole_number

from .kernel import T
from .model import ModelCost, SiteCost
from .plot_style import (
    DENSE,
    SPARSE,
    Path,
    Side,
    add_legend,
    new_figure,
    plain_ticks,
    save,
    style,
    write,
    write_beside,
)
from .work import Comparison, Work

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

POINTS = 96
"""Token counts of a curve."""
ACROSS = 4
"""Panels side by side."""

# ---- time against tokens -------------------------------------------------------------------------


def plot_time(
    cost: ModelCost, path: Path | None = None, *, tokens: tuple[int, int] = (32, 32768)
) -> Figure:
    """Draw time and speed-up against tokens: of the model, then of one of each sparse group.

    Args:
        cost: of a model.
        path: where to save the figure, as ``.svg`` or ``.png``.
        tokens: the least and the largest token count.

    Raises:
        OptionError: if ``tokens`` is no range of token counts, or no projection is counted.
        ImportError: if matplotlib is not installed.
    """
    least, most = (whole_number("tokens", count, 1) for count in tokens)
    if least >= most:
        raise OptionError(f"tokens={tokens!r} must be two token counts, the lesser one first")
    counts = [least * (most / least) ** (step / POINTS) for step in range(POINTS + 1)]
    panels: list[tuple[str, Comparison]] = [("all projections", cost)]
    panels += _alike([group for group in _shown(cost) if group.changed])
    columns = min(ACROSS, max(2, len(panels)))
    bands = ceil(len(panels) / columns)
    with style():
        title = f"Time of the projections on {cost.rates.name}, {cost.dtype}"
        figure = new_figure(title, 3 * columns, 4.2 * bands)
        axes = figure.subplots(2 * bands, columns, squeeze=False, height_ratios=[2, 1] * bands)
        places = [(2 * band, column) for band in range(bands) for column in range(columns)]
        for (row, column), (name, both) in zip(places, panels, strict=False):
            axes[row][column].set_title(name)
            _draw_panel(axes[row][column], axes[row + 1][column], both, counts)
        for row, column in places[len(panels) :]:
            axes[row][column].set_visible(False)
            axes[row + 1][column].set_visible(False)
        _label_panels(axes)
        add_legend(figure, axes[0][0])
        save(figure, path)
    return figure


def _alike(groups: Iterable[SiteCost]) -> list[tuple[str, Comparison]]:
    """Return a title and one projection for groups that take the same time, such as q and o."""
    found: dict[tuple[Expr, Expr], list[SiteCost]] = {}
    for group in groups:
        key = group.one.dense.seconds, group.one.sparse.seconds
        found.setdefault(key, []).append(group)
    return [(f"one {_title(same)}", same[0].one) for same in found.values()]


def _title(same: Sequence[SiteCost]) -> str:
    if len(same) == 1:
        return same[0].label
    return f"{_roles(same)} {'x'.join(map(str, same[0].sites[0].shape))}"


def _draw_panel(above: Axes, below: Axes, both: Comparison, counts: Sequence[float]) -> None:
    """Draw the two times above, and how many times faster sparse is below."""
    dense, sparse = (_milliseconds(work, counts) for work in (both.dense, both.sparse))
    gains = [one / other for one, other in zip(dense, sparse, strict=True)]
    above.loglog(counts, dense, color=DENSE, label="dense")
    above.loglog(counts, sparse, color=SPARSE, label="sparse")
    below.axhline(1, color=DENSE)
    below.semilogx(counts, gains, color=SPARSE)
    least = both.break_even
    if least is not None and counts[0] <= least <= counts[-1]:
        break_even: dict[str, Any] = {"marker": "o", "linestyle": "", "color": SPARSE}
        label = "break-even, in tokens"
        above.plot(least, _milliseconds(both.sparse, [least])[0], label=label, **break_even)
        below.plot(least, 1, **break_even)
        room = least * 4 < counts[-1]
        write(
            below, str(least), (least, 1), (5 if room else -5, -11), ha="left" if room else "right"
        )
    end, beside = (counts[-1], gains[-1]), (0, 4 if gains[-1] > 1 else -11)
    write(below, f"{gains[-1]:.2f}", end, beside, ha="right")
    plain_ticks(above.yaxis)
    for axes in (above, below):
        plain_ticks(axes.xaxis)


def _label_panels(axes: NDArray[Any]) -> None:
    """Say what the axes are, and give all speed-ups one scale."""
    below = [panel for row in axes[1::2] for panel in row if panel.get_visible()]
    limits = [0.95, 1.05, *(limit for panel in below for limit in panel.get_ylim())]
    for panel in below:
        panel.set(ylim=(min(limits) - 0.05, max(limits) + 0.05), xlabel="tokens")
    for row in axes[::2]:
        row[0].set_ylabel("milliseconds")
    for row in axes[1::2]:
        row[0].set_ylabel("times as fast")


def _milliseconds(work: Work, counts: Iterable[float]) -> list[float]:
    function = lambdify(T, 1000 * work.seconds, "math")
    return [float(function(count)) for count in counts]


# ---- roofline ------------------------------------------------------------------------------------


def plot_roofline(cost: ModelCost, path: Path | None = None, *, tokens: int = 2048) -> Figure:
    """Draw the roofline, and where every counted group stands below it, dense and sparse.

    Rate and intensity count the operations of the dense projection, whatever is left out of them;
    bytes and time include the selection.

    Args:
        cost: of a model.
        path: where to save the figure, as ``.svg`` or ``.png``.
        tokens: of the call.

    Raises:
        OptionError: unless ``tokens`` is a whole number of at least 1 and a projection is counted.
        ImportError: if matplotlib is not installed.
    """
    whole_number("tokens", tokens, 1)
    groups = _shown(cost)
    with style():
        title = f"Roofline of {cost.rates.name}, {cost.dtype}, and projections of {tokens} tokens"
        figure = new_figure(title, 7.5, 4.6)
        axes = figure.subplots()
        _draw_roofs(axes, cost, [_points(group, tokens)[0][0] for group in groups])
        axes.set(xlabel="operations per byte moved", ylabel="TFLOP/s, of the dense operations")
        for axis in (axes.xaxis, axes.yaxis):
            plain_ticks(axis, (1.0, 2.0, 5.0))
        _draw_points(axes, groups, tokens)
        add_legend(figure, axes)
        save(figure, path)
    return figure


def _draw_roofs(axes: Axes, cost: ModelCost, intensities: Sequence[float]) -> None:
    """Draw what memory and matmuls allow, dense and 2:4."""
    bandwidth, dense = cost.rates.bandwidth, cost.rates.dense[cost.dtype]
    roofs = [("2:4 matmul", SPARSE, cost.rates.sparse.get(cost.dtype)), ("matmul", DENSE, dense)]
    ridges = [rate / bandwidth for _, _, rate in roofs if rate]
    left, right = min([*ridges, *intensities]) / 2, max([*ridges, *intensities]) * 2
    for name, colour, rate in roofs:
        if rate:
            across = (left, rate / bandwidth, right)
            axes.loglog(across, [min(at * bandwidth, rate) / 1e12 for at in across], color=colour)
            text = f"{name}, {rate / 1e12:,.{0 if rate > 1e13 else 2}f} TFLOP/s"
            write(axes, text, (rate / bandwidth, rate / 1e12), (-6, 4), ha="right", color=colour)
    write(axes, f"{bandwidth / 1e9:,.0f} GB/s", (left, left * bandwidth / 1e12), (12, 2))
    axes.margins(y=0.12)


def _draw_points(axes: Axes, groups: Sequence[SiteCost], tokens: int) -> None:
    """Draw each group, a line from dense to sparse; groups at one place share their label."""
    labels: dict[tuple[tuple[float, float], Side], list[SiteCost]] = {}
    for group in groups:
        dense, *sparse = _points(group, tokens)
        labels.setdefault((dense, -1), []).append(group)
        axes.plot(*dense, "o", color=DENSE, label="dense")
        for end in sparse:
            labels.setdefault((end, 1), []).append(group)
            axes.plot(*zip(dense, end, strict=True), color=SPARSE, linewidth=0.8, zorder=1)
    for place, side in labels:
        if side > 0:
            axes.plot(*place, "D", color=SPARSE, label="sparse")
    write_beside(axes, [(place, _roles(same), side) for (place, side), same in labels.items()])


def _points(group: SiteCost, tokens: int) -> list[tuple[float, float]]:
    """Return FLOP/byte and TFLOP/s of a group, dense and, if it is sparse, sparse."""
    works = [group.one.dense, group.one.sparse] if group.changed else [group.one.dense]
    useful = 2 * group.one.dense.at(tokens)["macs"]
    costs = [work.at(tokens) for work in works]
    return [(useful / cost["bytes"], useful / cost["seconds"] / 1e12) for cost in costs]


def _shown(cost: ModelCost) -> list[SiteCost]:
    """Return the groups that take time.

    Raises:
        OptionError: if there are none.
    """
    shown = [group for group in cost.groups if group.counted and group.sites[0].macs]
    if not shown:
        raise OptionError("cost= has no projection that is counted: there is nothing to draw")
    return shown


def _roles(groups: Iterable[SiteCost]) -> str:
    return ", ".join(dict.fromkeys(group.role for group in groups))
