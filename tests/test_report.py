"""Reports: what they count, how graphs join, and what they say."""

import json
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from amber_compile import Report, Settings, last_reports
from amber_compile.decision import Decision, blocked, dense, sparse
from amber_compile.memory import Memory, readable
from amber_compile.plan import BY_PLAN
from amber_compile.quantization import Quantization
from amber_compile.report import KEPT, GraphReport, Site, clear_reports, record
from amber_compile.table import site_table

PLAIN = Settings("2:4")


def site(name: str, decision: Decision | None = None, macs: float = 100, **changes) -> Site:
    decision = sparse(PLAIN) if decision is None else decision
    made = Site(name, (8, 16), macs, "linear", decision, share=float(decision.sparse))
    return replace(made, **changes)


def report(*sites: Site, phase: str = "prefill", **changes) -> Report:
    return Report([GraphReport(phase, list(sites), **changes)])


# ---- counting ----


def test_coverage_is_the_share_of_macs_that_read_a_sparse_input():
    one = report(site("q", macs=300), site("k", dense("rule"), macs=100))
    assert one.coverage == 0.75
    assert one.removed == 0.375


@pytest.mark.parametrize(
    ("pattern", "removed"), [("4:4", 0), ("2:4", 0.5), ("1:4", 0.75), ("8:16", 0.5)]
)
def test_removed_is_what_the_pattern_drops(pattern, removed):
    one = report(site("q", sparse(Settings(pattern))))
    assert (one.coverage, one.removed) == (1, removed)


@pytest.mark.parametrize("role", ["head", "router"])
def test_heads_and_routers_are_not_counted(role):
    one = report(site("q"), site("other", dense("rule"), macs=1e6, role=role))
    assert one.coverage == 1
    one = report(site("q", dense("rule")), site("other", macs=1e6, role=role))
    assert one.coverage == one.removed == 0


def test_a_part_counts_in_part():
    one = report(site("gate_up", sparse(Settings(part="gate")), share=0.5))
    assert (one.coverage, one.removed) == (0.5, 0.25)


@pytest.mark.parametrize(
    "one", [Report(), report(), report(site("lm_head", role="head")), report(site("q", macs=0))]
)
def test_nothing_to_count(one):
    assert one.coverage == one.removed == 0
    assert str(one)


def test_a_projection_called_twice_counts_twice_in_one_site():
    both = site("q", macs=100).called_again(site("q", macs=300))
    assert (both.macs, both.share, both.decision) == (400, 1, sparse(PLAIN))


@pytest.mark.parametrize("order", [1, -1])
def test_a_projection_sparse_in_one_call_only(order):
    first, second = [site("q", macs=100), site("q", blocked("no"), macs=300)][::order]
    both = first.called_again(second)
    assert (both.macs, both.share) == (400, 0.25)
    assert both.decision.sparse
    assert report(both).coverage == 0.25


def test_calling_again_changes_neither_call():
    first, second = site("q"), site("q")
    first.called_again(second)
    assert (first.macs, second.macs) == (100, 100)


# ---- joining ----


def test_a_projection_of_two_graphs_stands_once():
    joined = Report.merge([report(site("q"), site("k", dense("a"))), report(site("q"), site("v"))])
    assert [one.name for one in joined.sites] == ["q", "k", "v"]
    assert len(joined.graphs) == 2


@pytest.mark.parametrize("order", [1, -1])
def test_prefill_speaks_for_a_projection(order):
    graphs = [
        report(site("q", dense("decode: one token")), phase="decode"),
        report(site("q", dense("rule"))),
    ]
    assert Report.merge(graphs[::order]).sites[0].decision == dense("rule")


@pytest.mark.parametrize("order", [1, -1])
def test_sparse_speaks_for_a_projection(order):
    graphs = [report(site("q", dense("few tokens"))), report(site("q"))]
    assert Report.merge(graphs[::order]).sites[0].decision.sparse


def test_what_only_decode_has_is_listed_too():
    joined = Report.merge([report(site("head"), phase="decode"), report(site("q"))])
    assert [one.name for one in joined.sites] == ["q", "head"]


def test_merging_nothing():
    assert Report.merge([]).sites == []


# ---- words ----


def test_the_summary_is_one_line():
    one = Report.merge(
        [
            report(site("q"), site("k", dense("rule"))),
            report(site("q", dense("decode")), phase="decode"),
            report(phase="decode"),
        ]
    )
    assert one.summary() == (
        "1 of 2 projections sparse, 50.0% of linear MACs covered, 25.0% removed; "
        "graphs: 1 prefill, 2 decode"
    )


def test_the_summary_of_nothing():
    assert Report().summary() == "no graph was compiled"
    assert report().summary().startswith("0 of 0 projections sparse, 0.0% of linear MACs covered")


def test_the_summary_tells_a_fallback_in_one_line():
    one = report(site("q", blocked("no")), fallback="RuntimeError: a\n  b")
    assert one.summary().endswith("; runs dense: RuntimeError: a b")


def test_str_is_the_summary_and_the_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    one = report(site("q"))
    assert str(one) == f"Amber: {one.summary()}\n\n{site_table(one.sites)}"
    assert str(Report()) == "Amber: no graph was compiled"


# ---- quantised ----

INT8 = Quantization("int8")
BOTH = Decision(settings=PLAIN, quantization=INT8)
QUANTIZED = Decision(reason="rule", quantization=INT8)
KEPT_WIDE = Decision(reason="rule: heads stay dense", unquantized="rule: heads stay in 16 bit")
BYTES = {"weight_bytes": 256, "code_bytes": 160}


def test_what_is_quantised_is_counted_with_or_without_sparsity():
    one = report(
        site("q", BOTH, macs=300, **BYTES),
        site("k", QUANTIZED, macs=100, **BYTES),
        site("v", dense("rule"), macs=100, weight_bytes=256),
        site("lm_head", KEPT_WIDE, macs=1e6, role="head", weight_bytes=256),
    )
    assert (one.coverage, one.quantized) == (0.6, 0.8)
    assert "; 2 quantised, 80.0% of linear MACs; graphs: 1 prefill" in one.summary()
    assert one.memory == Memory(4 * 256, 2 * 160, 0)
    assert (one.memory.before, one.memory.after) == (1024, 1344)
    assert one.memory.text() == (
        "weights of the projections: 1.02 kB before, 1.34 kB after (320 B in 8 bits)"
    )
    assert one.memory.text() in str(one)


def test_nothing_is_said_of_quantisation_where_nothing_is_quantised():
    one = report(site("q", weight_bytes=256), site("lm_head", KEPT_WIDE, role="head"))
    assert one.quantized == 0
    assert "quantised" not in one.summary()
    assert one.memory.text() == ""


def test_a_weight_that_some_graph_released_counts_no_more():
    prefill = GraphReport("prefill", [site("q", BOTH, **BYTES), site("k", QUANTIZED, **BYTES)])
    decode = GraphReport("decode", [site("q", QUANTIZED, released=True, **BYTES)])
    one = Report([prefill, decode])
    assert one.memory == Memory(512, 320, 256)
    assert one.memory.after == 512 - 256 + 320
    assert "256 B released" in str(one)
    assert "estimated: 512 B before" in str(replace(one, explained="explained for cuda"))
    assert one.to_json()["memory"] == {"before": 512, "after": 576, "codes": 320, "released": 256}


def test_a_site_stands_for_the_graph_that_did_most_to_it():
    graphs = [
        GraphReport("prefill", [site("q", dense("few tokens"))]),
        GraphReport("prefill", [site("q", QUANTIZED)]),
        GraphReport("prefill", [site("q", BOTH)]),
        GraphReport("decode", [site("q", QUANTIZED)]),
    ]
    for order in (graphs, graphs[::-1]):
        assert [one.decision for one in Report(order).sites] == [BOTH]
    assert [one.decision for one in Report(graphs[:2]).sites] == [QUANTIZED]
    again = site("q", QUANTIZED).called_again(site("q", dense("rule")))
    assert again.decision == QUANTIZED


def test_a_plan_of_a_report_has_its_formats():
    one = report(site("q", BOTH), site("k", QUANTIZED), site("lm_head", KEPT_WIDE, role="head"))
    made = one.plan().sites
    assert [made[name].quantization for name in ("q", "k")] == [INT8, INT8]
    assert made["lm_head"].quantization == "rule: heads stay in 16 bit"
    assert made["k"].choice == "rule"
    kept = replace(KEPT_WIDE, unquantized=f"{BY_PLAN}too sensitive")
    assert report(site("q", kept)).plan().sites["q"].quantization == "too sensitive"


def test_formats_in_json():
    data = report(site("q", BOTH), site("lm_head", KEPT_WIDE)).to_json()["sites"]
    assert (data[0]["quantized"], data[0]["unquantized"]) == ({"dtype": "int8"}, None)
    assert (data[1]["quantized"], data[1]["unquantized"]) == (None, "rule: heads stay in 16 bit")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (16_060_000_000, "16.1 GB")],
)
def test_a_readable_size(size, text):
    assert readable(size) == text


# ---- JSON ----


def test_json_is_complete_and_plain():
    graph = GraphReport("prefill", [site("q"), site("k", blocked("no"))], 1, 0.5, None, 0.25)
    data = json.loads(json.dumps(Report([graph]).to_json(), allow_nan=False))
    known = {"amber", "coverage", "removed", "sites", "graphs", "breaks", "explained", "output"}
    assert data.keys() == known | {"quantized", "memory"}
    own = {option.name for option in fields(GraphReport)} - {"traced", "plan"}  # no JSON
    assert data["graphs"][0].keys() == own
    (first, second) = data["graphs"][0]["sites"]
    assert data["sites"] == [first, second]
    own = {option.name for option in fields(Site)} - {"decision"}
    numbers = {"quantized", "unquantized", "unquantized_obstacle"}
    assert first.keys() == own | {"sparse", "dense", "obstacle"} | numbers
    assert (first["sparse"], first["dense"]) == (PLAIN.to_json(), None)
    assert (second["sparse"], second["dense"], second["obstacle"]) == (None, "no", True)
    assert first["shape"] == [8, 16]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_know(value):
    one = report(site("q", error=value), output_error=value)
    data = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert data["graphs"][0]["output_error"] == data["sites"][0]["error"] == str(value)


def test_a_report_is_not_changed_by_being_written():
    one = report(site("q"))
    one.to_json()
    assert one == report(site("q"))


# ---- the latest ----


def test_the_latest_reports_are_kept_oldest_first():
    for count in range(KEPT + 5):
        record(report(site(str(count))))
    kept = [one.sites[0].name for one in last_reports()]
    assert kept == [str(count) for count in range(5, KEPT + 5)]
    clear_reports()
    assert last_reports() == []


def test_the_list_is_the_callers():
    record(report())
    last_reports().clear()
    assert len(last_reports()) == 1


# ---- a model ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.down_proj = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 32)

    def forward(self, x):
        x = self.down_proj(self.q_proj(x))
        return self.lm_head(self.down_proj(x)[:, -1:])


@torch.no_grad()
def compile_block(**options) -> Report:
    compiled = torch.compile(Block(), backend="amber_eager", options=options)
    compiled(torch.randn(2, 4, 16))
    compiled(torch.randn(2, 1, 16))
    return Report.merge(last_reports())


def test_the_report_of_a_model():
    one = compile_block()
    assert [graph.phase for graph in one.graphs] == ["prefill", "decode"]
    found = {one.name: (one.macs, one.role, one.decision.sparse) for one in one.sites}
    assert found == {
        "q_proj": (256, "q", True),
        "down_proj": (512, "down", True),  # called twice
        "lm_head": (128, "head", False),  # for one token of four
    }
    assert (one.coverage, one.removed) == (1, 0.5)
    assert one.graphs[0].rewritten == 3
    assert one.graphs[1].rewritten == 0
    assert all(graph.seconds > 0 for graph in one.graphs)
    json.dumps(one.to_json(), allow_nan=False)


def test_the_report_of_a_model_with_nothing_sparse():
    one = compile_block(skip="*")
    assert one.summary().startswith("0 of 3 projections sparse, 0.0% of linear MACs covered")
    assert {one.decision.reason for one in one.sites} == {"skip='*'"}
    assert str(one).count("skip='*'") == 3


def test_a_checked_model_has_errors(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    one = compile_block(check=True)
    assert one.graphs[0].output_error > 0
    errors = {one.name: one.error for one in one.sites}
    assert errors["q_proj"] > 0
    assert errors["lm_head"] is None
    assert f"{errors['q_proj']:.4f}" in str(one)
