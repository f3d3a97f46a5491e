"""Pictures of an evaluation: what they show, and that they are files."""

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from amber_compile.errors import OptionError
from amber_compile.evaluation.plots import COLOURS, Point, frontier, heat_map

POINTS = [
    Point("paper", "2:4", 0.6, 0.15, 0.01),
    Point("paper", "2:4", 0.9, 0.40, 0.01),
    Point("paper", "8:16", 0.6, 0.09),
    Point("ours", "2:4", 0.7, 0.12, 0.02),
    Point("ours", "2:4", 0.8, math.nan),
]
SITES = {
    "model.layers.0.self_attn.q_proj": 0.1,
    "model.layers.0.mlp.down_proj": 0.25,
    "model.layers.10.self_attn.q_proj": 0.5,
    "model.layers.10.mlp.down_proj": math.nan,
    "lm_head": 0.05,
}


def curves(figure: Figure) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return the drawn places by colour and marker."""
    found = {}
    for bars in figure.axes[0].containers:
        line = bars.lines[0]
        places = list(zip(*(map(float, part) for part in line.get_data()), strict=True))
        found[line.get_color(), line.get_marker()] = places
    return found


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# ---- the frontier --------------------------------------------------------------------------------


def test_a_colour_for_each_method_and_a_marker_for_each_pattern():
    figure = frontier(POINTS)
    assert curves(figure) == {
        (COLOURS[0], "o"): [(0.6, 0.15), (0.9, 0.40)],
        (COLOURS[0], "s"): [(0.6, 0.09)],
        (COLOURS[1], "o"): [(0.7, 0.12)],  # the other one is not finite
    }
    axes = figure.axes[0]
    assert legend(axes) == ["paper", "ours", "2:4", "8:16"]
    assert axes.get_xlabel() == "linear MACs covered"
    assert "ΔNLL" in axes.get_ylabel()
    assert axes.get_ylim()[0] == 0


def test_the_band_joins_what_nothing_beats():
    band = frontier(POINTS).axes[0].lines[0]
    places = list(zip(*(map(float, part) for part in band.get_data()), strict=True))
    assert places == [(0.6, 0.09), (0.7, 0.12), (0.9, 0.40)]


def test_methods_at_one_coverage_stand_apart():
    figure = frontier([Point("a", "2:4", 0.5, 0.1), Point("b", "2:4", 0.5, 0.1)])
    figure.draw_without_rendering()
    lines = [bars.lines[0] for bars in figure.axes[0].containers]
    drawn = [line.get_transform().transform((0.5, 0.1)) for line in lines]
    assert drawn[1][0] - drawn[0][0] > 5
    assert drawn[1][1] == drawn[0][1]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(OptionError, match="none with a finite coverage and error"):
        frontier([Point("a", "2:4", 0.5, math.inf)])
    with pytest.raises(OptionError, match="no finite error"):
        heat_map({"q_proj": math.nan})


# ---- the heat map --------------------------------------------------------------------------------


def test_a_row_for_each_layer_and_a_column_for_each_projection():
    axes = heat_map(SITES).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "q_proj",
        "down_proj",
        "lm_head",
    ]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "10", "none"]
    [image] = axes.images
    shown = image.get_array()
    assert shown.shape == (3, 3)
    assert shown[0].tolist()[:2] == [0.1, 0.25]
    assert shown[2].tolist()[2] == 0.05
    assert {(text.xy, text.get_text()) for text in axes.texts} == {
        ((0, 0), ".100"),
        ((1, 0), ".250"),
        ((0, 1), ".500"),
        ((1, 1), "?"),
        ((2, 2), ".050"),
    }


def test_projections_of_one_name_keep_their_paths():
    sites = {"l.0.attention.output.dense": 0.1, "l.0.output.dense": 0.2, "l.0.query": 0.3}
    axes = heat_map(sites).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "attention.output.dense",
        "output.dense",
        "query",
    ]


def test_errors_can_be_read_on_their_fields():
    axes = heat_map(SITES).axes[0]
    [image] = axes.images
    for text in axes.texts:
        column, row = text.xy
        error = image.get_array()[row][column]
        if text.get_text() != "?":
            field = to_rgb(image.cmap(image.norm(float(error)))[:3])
            assert abs(_light(field) - _light(to_rgb(text.get_color()))) > 0.35


def _light(colour: tuple[float, float, float]) -> float:
    red, green, blue = colour
    return 0.3 * red + 0.59 * green + 0.11 * blue


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_both_are_saved(tmp_path: Path, ending: str):
    for at, draw in enumerate([lambda path: frontier(POINTS, path), lambda p: heat_map(SITES, p)]):
        path = tmp_path / f"{at}.{ending}"
        draw(path)
        assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
