"""The page of a report: what is on it, that it needs nothing else, and that nobody can write on it.

What it does in a browser: test_html_browser.py.
"""

import base64
import hashlib
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from deep import SHAPES, deep_report
from torch import nn

from amber_compile import Report, last_reports
from amber_compile.breaks import Break
from amber_compile.decision import dense
from amber_compile.page import page_of
from amber_compile.page.sites import STEPS, heat_map, rows_of
from amber_compile.page.sources import BUDGET, MOST, generated_code, kernel_sources
from amber_compile.report import GraphReport, Site

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\u2028&amp;'
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Elements of a page: their attributes, their nesting and the text inside."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), "no attribute is given twice"
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag, f"</{tag}> closes what is open"

    def handle_data(self, data: str) -> None:
        for at in self.open:
            self.texts[at].append(data)

    def all(self, tag: str, **attributes: str) -> list[str]:
        """Return the text of the elements with this tag and these attributes."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [
            "".join(text)
            for (name, held), text in zip(self.elements, self.texts, strict=True)
            if name == tag and wanted.items() <= held.items()
        ]

    def attributes(self, name: str) -> list[str]:
        """Return every value of an attribute."""
        return [str(held[name]) for _, held in self.elements if name in held]


def page(report: Report, title: str = "A report") -> tuple[str, Page]:
    text = page_of(report, title)
    return text, Page(text)


REPORT = deep_report(80)
DEEP_TEXT, DEEP = page(REPORT)


# ---- structure ----


def test_ids_are_unique_and_what_points_at_them_finds_them():
    ids = DEEP.attributes("id")
    assert len(set(ids)) == len(ids)
    assert set(DEEP.attributes("aria-labelledby")) <= set(ids)
    assert {target.removeprefix("#") for target in DEEP.attributes("href")} <= set(ids)


def test_headings_go_down_step_by_step():
    levels = [int(tag[1]) for tag, _ in DEEP.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_language_title_and_viewport_are_told():
    assert DEEP.attributes("lang") == ["en"]
    assert DEEP.all("title") == ["A report"]
    assert "viewport" in DEEP.attributes("name")


def test_every_cell_of_a_heading_says_what_it_heads():
    heads = [held for tag, held in DEEP.elements if tag == "th"]
    assert {held.get("scope") for held in heads} == {"row", "col"}


def test_every_button_and_input_has_a_name():
    for (tag, held), text in zip(DEEP.elements, DEEP.texts, strict=True):
        if tag == "button":
            assert held.get("aria-label") or "".join(text).strip()
            assert held.get("type") == "button"
    labels = sum(tag == "label" for tag, _ in DEEP.elements)
    assert labels == sum(tag in ("input", "select") for tag, _ in DEEP.elements)


def test_what_scrolls_is_reached_by_the_keyboard():
    scrolling = [held for _, held in DEEP.elements if "scroll" in str(held.get("class")).split()]
    assert scrolling
    assert all(held.get("tabindex") == "0" and held.get("role") == "region" for held in scrolling)


# ---- what it says ----


def test_every_projection_stands_in_the_table_once():
    names = [text for text in DEEP.all("th", scope="row") if not re.fullmatch(r".*\.\d+", text)]
    assert names == [site.name for site in REPORT.sites]


def test_the_summary_has_the_numbers_of_the_report():
    covered, removed = f"{REPORT.coverage:.1%}", f"{REPORT.removed:.1%}"
    assert {"240", covered, removed, "2", "0.2100"} <= set(DEEP.all("dd"))
    assert "of 561 projections sparse" in DEEP.all("dt")


def test_every_reason_is_told():
    (site,) = [site for site in deep_report(1).sites if site.name.endswith("up_proj")]
    _, small = page(Report([GraphReport("prefill", [replace(site, decision=dense("because"))])]))
    assert "because" in small.all("td")


def test_breaks_failures_and_remarks_are_told():
    report = deep_report(1)
    report.unended = [Break("cannot trace print", "model.py", 9, "forward", "print(x)")]
    report.explained = "Looked at, not run."
    report.graphs[0].fallback = "it broke"
    _, small = page(report)
    assert "model.py:9 in forward: print(x)" in small.all("code")
    assert "Looked at, not run." in small.all("p")
    assert "it broke" in small.all("p", role="alert")[0]


def test_the_source_of_a_kernel_is_there():
    kernels = Path(__file__).parents[2] / "kernels"
    assert (kernels / "cpu/nm_select.cpp").read_text() in DEEP.all("pre")


@pytest.mark.parametrize(
    "report",
    [Report(), Report([GraphReport("prefill")]), Report([GraphReport("decode", [])] * 3)],
    ids=["none", "empty", "several"],
)
def test_nothing_to_show(report):
    _, small = page(report)
    assert "No graph was taken down." in small.all("p")


def test_a_report_is_written_to_a_file(tmp_path):
    deep_report(2).to_html(tmp_path / "report.html", title="Ünïcode")
    assert Page((tmp_path / "report.html").read_text("utf-8")).all("h1") == ["Ünïcode"]


def test_a_compiled_model(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(16, 16)}) for _ in "ab")

        def forward(self, x):
            for one in self.layers:
                x = one["q_proj"](x)
            return x

    with torch.no_grad():
        torch.compile(Model(), backend="amber_eager", options={"check": True})(torch.ones(2, 8, 16))
    text, small = page(Report.merge(last_reports()))
    assert re.findall(r"layers\.\d\.q_proj", " ".join(small.all("th"))) == [
        "layers.0.q_proj",
        "layers.1.q_proj",
    ]
    data = json.loads(small.all("script", type="application/json")[0])
    (graph,) = data["graphs"]
    assert graph["order"] == ["layers.0", "layers.1"]
    (step,) = graph["views"]["layers.1"]
    assert step["names"] == ["traced", "sparsify_projections"]
    assert "nm_select" in data["texts"][step["drawings"][1]]
    assert data["texts"][step["diff"]].startswith("--- before")
    assert "Error" in text


# ---- it needs nothing else ----


def test_it_asks_for_nothing():
    assert not {"src", "action", "srcset", "poster", "data", "ping"} & {
        name for _, held in DEEP.elements for name in held
    }
    assert not {"link", "iframe", "img", "object", "embed", "base"} & {
        tag for tag, _ in DEEP.elements
    }
    assert all(target.startswith("#") for target in DEEP.attributes("href"))
    style = "".join(DEEP.all("style"))
    assert "@import" not in style
    assert "url(" not in style
    addresses = set(re.findall(r"https?://[\w./-]+", DEEP_TEXT))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_browser_is_forbidden_to_ask():
    (policy,) = [held["content"] for _, held in DEEP.elements if "http-equiv" in held]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    scripts = [text for text in DEEP.all("script") if text not in DEEP.all("script", id="data")]
    for content in (*DEEP.all("style"), *scripts):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not [name for _, held in DEEP.elements for name in held if name.startswith("on")]
    assert not DEEP.attributes("style")


def test_a_deep_model_fits():
    assert len(DEEP_TEXT.encode()) < 1_500_000


def test_layers_share_their_drawings():
    data = json.loads(DEEP.all("script", id="data")[0])
    drawings = [text for text in data["texts"] if text.startswith("<svg")]
    assert len(drawings) < 15
    views = data["graphs"][0]["views"]
    assert views["model.layers.3"][0]["drawings"] == views["model.layers.70"][0]["drawings"]
    assert views["model.layers.3"][0]["diff"] != views["model.layers.70"][0]["diff"]


def test_layers_that_share_a_graph_share_its_view():
    report = deep_report(1)
    more = [
        replace(site, name=site.name.replace(".0.", ".7."))
        for site in report.graphs[0].sites
        if ".0." in site.name
    ]
    report.graphs[0].sites += more
    data = json.loads(page(report)[1].all("script", id="data")[0])
    assert data["graphs"][0]["views"]["model.layers.7"] == "model.layers.0"


# ---- nobody can write on it ----


def test_hostile_names_stay_text():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.ModuleDict({HOSTILE.replace(".", ""): nn.Linear(8, 8)})]
            )

        def forward(self, x):
            return self.layers[0][HOSTILE.replace(".", "")](x)

    with torch.no_grad():
        torch.compile(Model(), backend="amber_eager", options={"projections": "*"})(
            torch.ones(2, 4, 8)
        )
    text, small = page(Report.merge(last_reports()), title=HOSTILE)
    plain = page(deep_report(1))[1]
    assert {tag for tag, _ in small.elements} <= {tag for tag, _ in plain.elements}
    assert len(small.all("script")) == 2
    assert small.all("title") == [HOSTILE]
    assert "<img" not in text
    assert "\u2028" not in small.all("script", id="data")[0]


@pytest.mark.parametrize("field", ["name", "kernel", "reason", "explained", "fallback", "broken"])
def test_hostile_text_stays_text(field):
    report = deep_report(1)
    graph = report.graphs[0]
    if field in ("name", "kernel"):
        graph.sites[0] = replace(graph.sites[0], **{field: HOSTILE})
    elif field == "reason":
        graph.sites[1] = replace(graph.sites[1], decision=dense(HOSTILE))
    elif field == "explained":
        report.explained = HOSTILE
    elif field == "fallback":
        graph.fallback = HOSTILE
    else:
        graph.broken = Break(HOSTILE, HOSTILE, 1, HOSTILE, HOSTILE)
    text, small = page(report)
    assert "<img" not in text
    assert len(small.all("script")) == 2


# ---- rows and cells ----


def site(name: str, **more) -> Site:
    return replace(deep_report(1).graphs[0].sites[0], name=name, **more)


def test_columns_are_named_by_what_tells_them_apart():
    names = ["h.0.a.proj", "h.0.b.proj", "h.0.b.up", "h.1.b.up"]
    heat = heat_map(rows_of(Report([GraphReport("prefill", [site(name) for name in names])])))
    assert heat.columns == [("a.proj", "a.proj"), ("b.proj", "b.proj"), ("b.up", "up")]
    assert [(name, [bool(cell) for cell in cells]) for name, cells in heat.lines] == [
        ("h.0", [True, True, True]),
        ("h.1", [False, False, True]),
    ]


def test_what_lies_outside_of_layers_is_listed():
    heat = heat_map(rows_of(deep_report(2)))
    assert heat.others == [2 * len(SHAPES)]


@pytest.mark.parametrize(
    ("error", "shade"),
    [(0.0, 0), (0.01, 1), (0.5, 5), (1.0, STEPS), (float("inf"), STEPS), (float("nan"), STEPS)],
)
def test_errors_are_shaded_up_to_the_largest(error, shade):
    rows = rows_of(
        Report([GraphReport("prefill", [site("h.0.q", error=error), site("h.1.q", error=1.0)])])
    )
    assert heat_map(rows).lines[0][1][0].error == shade


def test_shares_of_macs_leave_out_the_head():
    rows = rows_of(deep_report(2))
    assert sum(row.macs for row in rows) == pytest.approx(1)
    assert rows[-1].macs == 0


# ---- sources ----


def test_an_unknown_kernel_has_no_source():
    (kernel,) = kernel_sources([site("q", kernel="something, Fortran")])
    assert kernel.sources == []


def test_the_reference_is_a_source():
    (kernel,) = kernel_sources([site("q", kernel="nm_select, reference")])
    assert kernel.sources[0].name.endswith("nm_select.py")


def test_generated_code_is_read_when_the_page_is_written(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("x = 1  # <b>")
    graph = GraphReport("prefill", code_files=[str(file)])
    assert [source.text for source in generated_code([graph])] == ["x = 1  # <b>"]
    assert "x = 1  # <b>" in page(Report([graph]))[1].all("pre")
    file.unlink()
    (source,) = generated_code([graph])
    assert (source.text, source.remark[:12]) == ("", "not recorded")


def test_generated_code_is_cut_to_keep_the_page_small(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("x" * (MOST + 1))
    graphs = [GraphReport("prefill", code_files=[str(file)])] * 5
    sources = generated_code(graphs)
    assert sum(len(source.text) for source in sources) == BUDGET
    assert f"of {MOST + 1:,} characters" in sources[0].remark
    assert "left out" in sources[-1].remark
