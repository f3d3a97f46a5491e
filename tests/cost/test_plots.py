"""Pictures of the cost: what they show, that they can be read, and that they are files."""

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from amber_compile import Settings
from amber_compile.cost import ModelCost, cost_of
from amber_compile.cost.plot_style import DENSE, INK, SPARSE, short
from amber_compile.cost.plots import ACROSS, plot_roofline, plot_time
from amber_compile.cost.rates import Rates
from amber_compile.decision import dense, sparse
from amber_compile.errors import OptionError
from amber_compile.report import Site

SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
CPU = Rates("CPU", "a test", {"bfloat16": 2e11}, {}, 2e10, 3e-6, 1.5)


def cost(machine: Rates | str = "H100 SXM", kept=("q", "gate", "down")) -> ModelCost:
    return cost_of([site(role, role in kept) for role in SHAPES], machine)


def site(role: str, kept: bool) -> Site:
    n, k = SHAPES[role]
    decision = sparse(Settings("2:4")) if kept else dense("rule")
    return Site(f"layers.0.{role}", (n, k), n * k, "linear", decision, role, float(kept))


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def visible(figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


# ---- time ----


def test_a_panel_for_the_model_and_one_for_each_sparse_group():
    axes = visible(plot_time(cost()))
    assert [panel.get_title("left") for panel in axes[:4]] == [
        "all projections",
        "one q 4096x4096",
        "one gate 14336x4096",
        "one down 4096x14336",
    ]
    assert len(axes) == 8


def test_curves_are_the_formulas():
    model = cost()
    line_dense, line_sparse, *_ = plot_time(model, tokens=(100, 1000)).axes[0].lines
    assert (line_dense.get_color(), line_sparse.get_color()) == (DENSE, SPARSE)
    for line, work in ((line_dense, model.dense), (line_sparse, model.sparse)):
        counts, times = line.get_data()
        assert (counts[0], counts[-1]) == pytest.approx((100, 1000))
        assert times[0] == pytest.approx(1000 * work.at(100)["seconds"])
        assert times[-1] == pytest.approx(1000 * work.at(1000)["seconds"])


def test_break_even_is_marked():
    model = cost()
    figure = plot_time(model)
    above, below = figure.axes[0], figure.axes[4]
    assert above.lines[2].get_xdata() == [model.break_even]
    assert str(model.break_even) in texts(below)
    assert below.get_xlim() == above.get_xlim()


def test_a_break_even_outside_is_not():
    figure = plot_time(cost(), tokens=(4096, 8192))
    assert len(figure.axes[0].lines) == 2
    assert len(texts(figure.axes[4])) == 1


def test_never_faster():
    figure = plot_time(cost(CPU))
    assert [len(axes.lines) for axes in visible(figure)[:4]] == [2] * 4
    low, high = figure.axes[4].get_ylim()
    assert low < 1 < high


def test_groups_that_take_the_same_time_share_a_panel():
    sites = [site(role, True) for role in SHAPES]
    model = cost_of([*sites, replace(site("q", True), name="layers.0.o", role="o")], "H100 SXM")
    titles = [axes.get_title("left") for axes in plot_time(model).axes]
    assert "one q, o 4096x4096" in titles


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_any_number_of_panels(count):
    n, k = SHAPES["q"]
    sites = [
        Site(f"p{at}", (n + 64 * at, k), (n + 64 * at) * k, "linear", sparse(Settings()), share=1.0)
        for at in range(count)
    ]
    figure = plot_time(cost_of(sites or [site("k", False)], "L40S"))
    assert len(visible(figure)) == 2 * (1 + count)
    assert len(figure.axes) % ACROSS == 0 or count < ACROSS


@pytest.mark.parametrize("tokens", [(0, 10), (10, 10), (10, 5), (-1, 5), (1.5, 2)])
def test_tokens_are_a_range(tokens):
    with pytest.raises(OptionError, match="must be"):
        plot_time(cost(), tokens=tokens)


@pytest.mark.parametrize("draw", [plot_time, plot_roofline])
def test_nothing_to_draw(draw):
    with pytest.raises(OptionError, match="nothing to draw"):
        draw(cost_of([], "L40S"))


# ---- roofline ----


def test_every_group_stands_below_its_roof():
    model = cost()
    (axes,) = plot_roofline(model, tokens=2048).axes
    dense, sparse = (
        [line.get_xydata()[0] for line in axes.lines if line.get_marker() == marker]
        for marker in "oD"
    )
    assert (len(dense), len(sparse)) == (4, 3)
    for points, roof in ((dense, model.rates.dense), (sparse, model.rates.sparse)):
        for intensity, rate in points:
            limit = min(intensity * model.rates.bandwidth, roof["bfloat16"])
            assert 0.5 * limit < rate * 1e12 < limit


def test_places_are_named():
    (axes,) = plot_roofline(cost()).axes
    assert {"q", "k", "gate", "down", "gate, down", "3,015 GB/s"} >= set(texts(axes)[2:])
    assert texts(axes)[:2] == ["2:4 matmul, 1,100 TFLOP/s", "matmul, 792 TFLOP/s"]


def test_names_do_not_overlap():
    figure = plot_roofline(cost(CPU))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without its leader
    assert len(boxes) > 5
    for at, box in enumerate(boxes):
        assert box.count_overlaps(boxes[at + 1 :]) == 0


def test_a_machine_without_a_sparse_unit_has_one_roof():
    (axes,) = plot_roofline(cost(CPU)).axes
    assert texts(axes)[:2] == ["matmul, 0.20 TFLOP/s", "20 GB/s"]


def test_a_roofline_needs_tokens():
    with pytest.raises(OptionError, match="tokens=0 must be a whole number >= 1"):
        plot_roofline(cost(), tokens=0)


# ---- files ----


@pytest.mark.parametrize("draw", [plot_time, plot_roofline])
def test_a_picture_is_saved_without_a_background_and_alike_each_time(draw, tmp_path):
    draw(cost(), tmp_path / "one.svg")
    draw(cost(), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert ET.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    draw(cost(), str(tmp_path / "one.png"))
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_drawn_on_nothing():
    figure = plot_time(cost())
    assert all(part.get_facecolor()[3] == 0 for part in (figure, *figure.axes))


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("colour", [INK, DENSE, SPARSE])
def test_colours_stand_out_from_light_and_dark_pages(page, colour):
    lighter, darker = sorted(map(luminance, (page, colour)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) > 3.4


def luminance(colour: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("value", "text"), [(0.01, "0.01"), (250, "250"), (16000, "16k"), (2e6, "2M"), (1500, "1.5k")]
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'amber-compile\[inspect\]'"):
        plot_time(cost())
