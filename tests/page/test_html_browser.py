"""The page of a report in headless Chromium: it loads, it works, by mouse and by keyboard, fast.

80 layers of 7 projections. Skipped where there is no Chromium.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from deep import deep_report

from amber_compile.sketch import Stage

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs the program chromium")

READY = "performance.getEntriesByName('amber-ready')[0].startTime"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    deep_report(80).to_html(path, title="80 layers")
    return path


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(window: Browser, file: Path) -> Iterator[Browser]:
    """The page, freshly loaded; whatever a test does to it, nobody complains."""
    window.open(file)
    yield window
    assert window.errors == []
    assert window.requests == [file.as_uri()]


def value(page: Browser, selector: str, name: str) -> object:
    return page.run(f"document.querySelector({json.dumps(selector)}).{name}")


def shown(page: Browser) -> list[str]:
    """Return the names in the table, as they stand."""
    return page.run(
        "[...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden)"
        ".map(row => row.cells[0].textContent)"
    )


def pick(page: Browser, selector: str, option: str) -> None:
    """Choose from a list as a person does, who causes an event."""
    page.run(
        f"(() => {{const one = document.querySelector({json.dumps(selector)});"
        f"one.value = {json.dumps(option)}; one.dispatchEvent(new Event('change'))}})()"
    )


def search(page: Browser, text: str) -> None:
    page.run("document.getElementById('filter').focus()")
    for letter in text:
        page.key(letter)


# ---- loading ----


def test_it_is_interactive_in_less_than_a_second(page, file):
    times = [page.run(READY)]
    for _ in range(4):
        page.open(file)
        times.append(page.run(READY))
    assert min(times) < 1000  # the machine may be busy; the page cannot be faster than it is


def test_it_loads_quietly(page):
    assert page.run("document.title") == "80 layers"
    assert page.run("document.documentElement.classList.contains('scripted')")


def test_a_search_answers_at_once(page):
    spent = page.run(
        "(async () => {const box = document.getElementById('filter'); box.value = 'gate';"
        "const start = performance.now(); box.dispatchEvent(new Event('input'));"
        "await new Promise(done => requestAnimationFrame(() => setTimeout(done)));"
        "return performance.now() - start})()"
    )
    assert spent < 1000
    assert len(shown(page)) == 80


# ---- table ----


def test_searching(page):
    search(page, "layers.79 proj")
    assert len(shown(page)) == 7
    assert value(page, "#count", "textContent") == "7 of 561 projections"


def test_searching_in_reasons(page):
    search(page, "lm_head stays")
    assert shown(page) == ["lm_head"]


@pytest.mark.parametrize(("kind", "count"), [("sparse", 240), ("dense", 321), ("", 561)])
def test_dense_or_sparse(page, kind, count):
    page.click(f"[name=kind][value={kind!r}]")
    assert len(shown(page)) == count


def test_sorting_by_name_is_natural_and_turns_around(page):
    page.click("#table thead th:nth-child(1) button")
    names = shown(page)
    assert names[0] == "lm_head"
    assert names.index("model.layers.9.mlp.up_proj") < names.index("model.layers.10.mlp.up_proj")
    assert value(page, "#table thead th", "ariaSort") == "ascending"
    page.click("#table thead th:nth-child(1) button")
    assert shown(page) == names[::-1]
    assert value(page, "#table thead th", "ariaSort") == "descending"


def test_sorting_by_a_number(page):
    page.click("#table thead th:nth-child(7) button")
    page.click("#table thead th:nth-child(7) button")
    assert shown(page)[0] == "model.layers.79.mlp.down_proj"


def test_sorting_by_keyboard(page):
    page.run("document.querySelector('#table thead th:nth-child(2) button').focus()")
    page.key("Enter")
    assert value(page, "#table thead th:nth-child(2)", "ariaSort") == "ascending"


def test_a_row_tells_about_its_projection(page):
    page.click("#table tbody tr:nth-child(5)")
    detail = value(page, "#detail", "textContent")
    assert "mlp.gate_proj" in detail
    assert "weight_norm, norm correction" in detail
    assert value(page, "#table tbody tr:nth-child(5)", "className") == "sparse chosen"


# ---- heat map ----


@pytest.mark.parametrize(
    ("measure", "shade", "text"),
    [("coverage", "h10", "2:4"), ("removed", "h5", "2:4"), ("error", "h2", "0.0500")],
)
def test_the_heat_map_shows_what_is_asked_for(page, measure, shade, text):
    page.click(f"[name=measure][value={measure}]")
    assert value(page, "#heat td button", "className") == shade
    assert value(page, "#heat td button", "textContent") == text
    assert value(page, "#heat tbody tr td:nth-child(3) button", "className") == "h0"


def test_cells_of_different_shades_have_different_colours(page):
    page.click("[name=measure][value=error]")
    colours = page.run(
        "[...new Set([...document.querySelectorAll('#heat button')]"
        ".map(cell => getComputedStyle(cell).backgroundColor))].length"
    )
    assert colours > 6


def test_the_heat_map_by_keyboard(page):
    page.run("document.querySelector('#heat [tabindex=\"0\"]').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown"):
        page.key(key)
    assert value(page, ":focus", "ariaLabel") == "model.layers.1.self_attn.k_proj: dense"
    page.key("Enter")
    assert "rule: k_proj stays dense" in value(page, "#detail", "textContent")
    assert page.run("document.querySelectorAll('#heat [tabindex=\"0\"]').length") == 1


# ---- graphs ----


def test_a_graph_shows_before_and_after(page):
    assert value(page, "#layer", "value") == "model.layers.0"
    assert value(page, "#graph-text", "textContent") == "6 operations new or changed."
    assert page.run("document.querySelectorAll('#before .amber').length") == 0
    assert page.run("document.querySelectorAll('#after .amber.new').length") == 3
    assert page.run("document.querySelectorAll('#after .sparse.changed').length") == 3
    width = page.run("document.querySelector('#after svg').getBoundingClientRect().width")
    assert width > 300


def test_layer_by_layer(page):
    page.click("#next")
    assert value(page, "#layer", "value") == "model.layers.1"
    page.click("#previous")
    assert value(page, "#layer", "value") == "model.layers.0"
    assert value(page, "#previous", "disabled") is True
    pick(page, "#layer", "")
    assert value(page, "#next", "disabled") is True
    assert "lm_head" in value(page, "#before", "textContent")
    assert "No pass changed anything here" in value(page, "#graph-text", "textContent")


def test_a_dense_graph_has_one_picture(page):
    pick(page, "#graph", "1")
    assert value(page, "#before-name", "textContent") == "as it was traced"
    assert page.run("document.querySelector('#after').parentElement.hidden")
    assert page.run("document.querySelectorAll('#before .dense').length") == 7


def test_pass_by_pass(window, tmp_path):
    report = deep_report(1)
    before, _ = report.graphs[0].stages
    report.graphs[0].stages.append(Stage.of("another_pass", before.sketch))
    report.to_html(tmp_path / "passes.html")
    window.open(tmp_path / "passes.html")
    assert value(window, "#after-name", "textContent") == "after: another_pass"
    assert window.run("document.querySelectorAll('#before .amber.removed').length") == 3
    pick(window, "#step", "0")
    assert value(window, "#before-name", "textContent") == "before: traced"
    assert window.run("document.querySelectorAll('#after .amber.new').length") == 3
    assert window.errors == []


def test_the_text_of_a_change(page):
    page.click("[name=form][value=text]")
    assert value(page, "#drawings", "hidden") is True
    added = page.run("[...document.querySelectorAll('#diff ins')].map(one => one.textContent)")
    assert sum("amber.nm_select" in line for line in added) == 3
    assert len(page.run("[...document.querySelectorAll('#diff del')].map(x => x.textContent)")) == 3


def test_from_a_cell_to_its_graph_and_back(page):
    page.click("#heat tbody tr:nth-child(43) td:nth-child(8) button")
    page.click("#detail .link")
    assert value(page, "#layer", "value") == "model.layers.42"
    marked = page.run(
        "[...document.querySelectorAll('.chosen[data-site]')].map(x => x.dataset.site)"
    )
    assert marked == ["mlp.down_proj", "mlp.down_proj"]
    page.click('#after [data-site="mlp.up_proj"] rect')
    assert "mlp.up_proj" in value(page, "#detail h3", "textContent")


def test_from_a_projection_to_its_kernel(page):
    page.click("#heat td button")
    page.click("#detail .link:nth-child(2)")
    assert value(page, "#kernels ~ details", "open") is True
    assert "nm_select" in value(page, "#kernels ~ details pre", "textContent")


# ---- looks ----


def test_dark_is_dark(page):
    def background() -> str:
        return page.run("getComputedStyle(document.body).backgroundColor")

    light = background()
    page.prefer("dark")
    dark = background()
    page.prefer("light")
    assert sum(map(int, light[4:-1].split(","))) > 600 > 150 > sum(map(int, dark[4:-1].split(",")))


@pytest.mark.parametrize("width", [380, 800, 1440])
def test_nothing_is_wider_than_the_window(page, width):
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=False,
    )
    wide = page.run("document.documentElement.scrollWidth")
    page.call("Emulation.clearDeviceMetricsOverride")
    assert wide <= width


def test_all_of_it_is_printed(page):
    page.call("Emulation.setEmulatedMedia", media="print")
    hidden = page.run(
        "document.querySelector('#table').parentElement.scrollHeight <= "
        "document.querySelector('#table').parentElement.clientHeight + 2"
    )
    controls = page.run("getComputedStyle(document.querySelector('.controls')).display")
    page.call("Emulation.setEmulatedMedia", media="")
    assert hidden
    assert controls == "none"


def test_without_scripts_the_tables_are_there(window, file):
    window.call("Emulation.setScriptExecutionDisabled", value=True)
    window.open(file)
    window.call("Emulation.setScriptExecutionDisabled", value=False)
    assert len(shown(window)) == 561
    assert window.run("getComputedStyle(document.querySelector('#graph-view')).display") == "none"
    assert window.run("getComputedStyle(document.querySelector('.controls')).display") == "none"


def test_hostile_text_runs_nowhere(window, tmp_path):
    report = deep_report(1)
    hostile = '</script><img src=x onerror="document.title = 1"><svg onload="document.title = 2">'
    for site in report.graphs[0].sites:
        site.name += hostile
    path = tmp_path / "hostile.html"
    report.to_html(path, title="calm")
    window.open(path)
    window.click("#table tbody tr")
    assert window.run("document.title") == "calm"
    assert window.run("document.querySelectorAll('img').length") == 0
    assert window.errors == []
    assert window.requests == [path.as_uri()]
