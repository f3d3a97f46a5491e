"""The table of a report: a line for each projection, at any width."""

import math
from dataclasses import replace

import pytest

from amber_compile import Settings
from amber_compile.decision import Decision, blocked, dense, sparse
from amber_compile.quantization import Quantization
from amber_compile.report import Site
from amber_compile.table import LONGEST, site_table

PLAIN = Settings("2:4")
LONG = "rule: q is fused with k and v, which stay dense; list it in projections= to sparsify all"


def site(name: str, decision: Decision | None = None, **changes) -> Site:
    return replace(Site(name, (8, 16), 128, "linear", decision or sparse(PLAIN)), **changes)


def table(width: int, monkeypatch, *sites: Site) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    return site_table(sites).splitlines()


def test_the_table(monkeypatch):
    sites = [
        site("layers.0.q_proj", kernel="nm_select"),
        site("layers.0.qkv_proj", dense(LONG), shape=(4, 8, 16)),
        site("layers.0.k_proj", dense("rule: k_proj stays dense")),
    ]
    assert table(120, monkeypatch, *sites) == [
        "projection          weight   input   how, or why not            kernel",
        "─────────────────────────────────────────────────────────────────────────",
        "layers.0.q_proj     8x16     2:4     weight_norm                nm_select",
        "layers.0.qkv_proj   4x8x16   dense   [1]",
        "layers.0.k_proj     8x16     dense   rule: k_proj stays dense",
        "",
        f"[1] {LONG}",
    ]


def test_a_column_of_formats_where_somebody_asked(monkeypatch):
    smooth = Quantization("int8", "smoothquant")
    head = Decision(reason="rule: heads stay dense", unquantized="rule: heads stay in 16 bit")
    sites = [
        site("layers.0.q_proj", Decision(settings=PLAIN, quantization=Quantization("int8"))),
        site(
            "layers.0.k_proj",
            Decision(reason="rule: k_proj stays dense", quantization=smooth),
            kernel="quantize_rows, AMX",
            smoothing="in the quantise kernel",
        ),
        site("lm_head", head, weight_bytes=2 * 8 * 16),
    ]
    lines = table(120, monkeypatch, *sites)
    assert "input   format                      how, or why not" in lines[0]
    assert "2:4     int8                        weight_norm" in lines[2]
    assert "dense   int8, smoothquant 0.5 [1]   rule: k_proj stays dense   quanti" in lines[3]
    assert "dense   16 bit [2]                  rule: heads stay dense" in lines[4]
    assert lines[-2:] == ["[1] in the quantise kernel", "[2] rule: heads stay in 16 bit"]


def test_the_bits_of_what_is_not_quantised_are_those_of_its_weight():
    asked = Decision(reason="rule", unquantized="quantize_skip='*'")
    assert site("q", asked, weight_bytes=4 * 8 * 16).format == "32 bit"
    assert site("q", asked).format == "16 bit"
    assert site("q", dense("rule")).format == ""


def test_what_a_kernel_lacks_is_a_note(monkeypatch):
    sites = [
        site("layers.0.q_proj", kernel="nm_select, Triton; 4:8 has no sparse unit"),
        site("layers.0.k_proj", dense("rule: k_proj stays dense")),
        site("layers.0.down_proj", kernel="nm_select, Triton; 4:8 has no sparse unit"),
    ]
    lines = table(120, monkeypatch, *sites)
    assert lines[2].endswith("weight_norm                nm_select, Triton [1]")
    assert lines[4].endswith("weight_norm                nm_select, Triton [1]")
    assert lines[-1] == "[1] 4:8 has no sparse unit"


LAYERS = [
    replace(one, name=f"model.layers.{layer}.{one.name}")
    for layer in range(32)
    for one in (
        site("self_attn.q_proj", kernel="nm_select"),
        site("self_attn.k_proj", dense("rule: k_proj stays dense")),
        site("self_attn.v_proj", dense("rule: v_proj stays dense")),
        site("self_attn.o_proj", dense("rule: o_proj stays dense")),
        site("mlp.gate_proj", sparse(Settings("2:4", part="gate", correction="norm"))),
        site("mlp.up_proj", dense(LONG)),
        site("mlp.down_proj", blocked("K = 1 is not a multiple of M = 4")),
    )
]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_every_projection_has_one_line_at_any_width(monkeypatch, width):
    lines = table(width, monkeypatch, *LAYERS)
    body, notes = lines[2 : 2 + len(LAYERS)], lines[2 + len(LAYERS) :]
    for one, line in zip(LAYERS, body, strict=True):
        assert line.startswith(f"{one.name} ")
        assert ("dense" if one.decision.reason else "2:4") in line
    assert len(notes) <= 2 + 7 * math.ceil(len(LONG) / width + 1)
    assert all(len(line) <= width for line in notes)
    if width >= 80:  # what the names need
        assert max(map(len, body)) <= width


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_every_reason_is_told_in_full(monkeypatch, width):
    text = " ".join(" ".join(table(width, monkeypatch, *LAYERS)).split())
    for reason in {one.decision.reason for one in LAYERS if one.decision.reason}:
        assert reason in text
    assert "weight_norm, norm correction, gate half only" in text


def test_a_reason_up_to_the_limit_stays_in_its_line(monkeypatch):
    kept, noted = "a" * LONGEST, "b" * (LONGEST + 1)
    lines = table(200, monkeypatch, site("q", dense(kept)), site("k", dense(noted)))
    assert lines[2].endswith(kept)
    assert lines[3].endswith("[1]")
    assert lines[5:] == [f"[1] {noted}"]


def test_equal_reasons_are_one_note(monkeypatch):
    lines = table(120, monkeypatch, *(site(name, dense(LONG)) for name in "abc"))
    assert [line.split()[-1] for line in lines[2:5]] == ["[1]", "[1]", "[1]"]
    assert len(lines) == 7


def test_errors_have_a_column_once_one_was_measured(monkeypatch):
    assert "error" not in table(120, monkeypatch, site("q"))[0]
    lines = table(120, monkeypatch, site("q", error=0.12345), site("k", dense("rule"), error=None))
    assert lines[0].endswith("error")
    assert lines[2].endswith(" 0.1235")
    assert lines[3].endswith("rule")


@pytest.mark.parametrize(
    "text", ["skip='[qk]_proj'", "[bold]not markup[/bold]", ":warning: is no emoji", "[/red]"]
)
def test_reasons_are_printed_as_they_are(monkeypatch, text):
    lines = table(120, monkeypatch, site("q", dense(text)), site(text))
    assert lines[2].endswith(text)
    assert lines[3].startswith(text)


def test_a_reason_of_several_lines_is_printed_in_one(monkeypatch):
    lines = table(120, monkeypatch, site("q", dense("a\n  b")))
    assert lines[2].endswith("a b")
    assert len(lines) == 3
