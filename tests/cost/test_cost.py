"""The cost model: against arithmetic by hand, against the report, and against a published estimate.

Shapes are those of Llama-3.1-8B: 32 layers, hidden 4096, intermediate 14336, 8 key-value heads.
"""

import json
from dataclasses import replace

import pytest
import torch
from sympy import Rational, simplify
from zoo import ZOO

from amber_compile import Report, Settings, last_reports
from amber_compile.cost import ModelCost, cost_of
from amber_compile.cost.kernel import T
from amber_compile.cost.rates import Rates
from amber_compile.cost.site import why_masked
from amber_compile.decision import Decision, dense, sparse
from amber_compile.errors import OptionError
from amber_compile.report import GraphReport, Site

SHAPES = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
ROUND = Rates("round", "a test", {"bfloat16": 1e15}, {"bfloat16": 16e14}, 4e12, 2e-6, 0.5)
NO_UNIT = replace(ROUND, sparse={})
PLAIN = Settings("2:4")


def site(role: str, decision: Decision | None = None, **changes) -> Site:
    decision = sparse(PLAIN) if decision is None else decision
    n, k = SHAPES[role]
    made = Site(f"layers.0.{role}", (n, k), n * k, "linear", decision, role=role)
    return replace(made, **{"share": float(decision.sparse), **changes})


def llama(pattern: str = "2:4", layers: int = 32) -> list[Site]:
    """The paper's rule, without the layers that it skips."""
    kept = {role: sparse(Settings(pattern)) for role in ("q", "gate", "down")}
    sites = [
        replace(site(role, kept.get(role, dense("rule"))), name=f"layers.{layer}.{role}")
        for layer in range(layers)
        for role in SHAPES
    ]
    head = Site("lm_head", (128256, 4096), 128256 * 4096, "linear", dense("head"), role="head")
    return [*sites, head]


def only(*sites: Site, machine: Rates = ROUND) -> ModelCost:
    return cost_of(sites, machine)


# ---- by hand ----


def test_a_dense_matmul():
    cost = only(site("q", dense("rule")))
    side = 4096
    assert cost.dense.macs == side * side * T
    assert simplify(cost.dense.bytes - 2 * (side * side + 2 * side * T)) == 0
    few, many = (cost.dense.at(count)["seconds"] for count in (1, 8192))
    assert few == pytest.approx(2e-6 + 2 * (side * side + 2 * side) / 4e12)
    assert many == pytest.approx(2e-6 + 2 * 8192 * side * side / 1e15)


def test_compress_and_a_sparse_matmul():
    n, k = SHAPES["gate"]
    cost = only(site("gate"))
    (compress, _), (matmul, _) = cost.sparse.kernels
    assert (compress.name, matmul.name) == ("compress", "2:4 matmul")
    assert compress.traffic == {
        "activations in": 2 * k * T,
        "values": k * T,
        "metadata": Rational(k, 8) * T,
    }
    assert matmul.traffic == {
        "values": k * T,
        "metadata": Rational(k, 8) * T,
        "weight": 2 * n * k,
        "activations out": 2 * n * T,
    }
    assert (compress.macs, matmul.macs) == (0, Rational(n * k, 2) * T)
    seconds = compress.seconds.subs(T, 4096), matmul.seconds.subs(T, 4096)
    assert float(seconds[0]) == pytest.approx(2e-6 + 4096 * k * 3.125 / (0.5 * 4e12))
    assert float(seconds[1]) == pytest.approx(2e-6 + 2 * 4096 * n * k / 16e14)


@pytest.mark.parametrize(
    ("pattern", "machine"), [("4:8", ROUND), ("8:16", ROUND), ("2:4", NO_UNIT)]
)
def test_select_and_a_dense_matmul_where_no_sparse_unit_serves(pattern, machine):
    n, k = SHAPES["down"]
    cost = only(site("down", sparse(Settings(pattern))), machine=machine)
    (select, _), (matmul, _) = cost.sparse.kernels
    assert (select.name, matmul.name) == ("select", "matmul")
    assert select.bytes == 4 * k * T
    assert cost.sparse.macs == cost.dense.macs == n * k * T
    assert cost.break_even is None
    assert cost.speedup(8192) < 1


def test_a_float32_activation_has_four_bytes_and_no_sparse_unit():
    cost = cost_of([site("q")], "H100 SXM", torch.float32)
    assert cost.dtype == "float32"
    assert [kernel.name for kernel, _ in cost.sparse.kernels] == ["select", "matmul"]
    assert cost.dense.at(1)["bytes"] == 4 * (4096 * 4096 + 2 * 4096)


def test_a_half_is_a_projection_of_half_the_outputs():
    whole = Site("gate_up", (28672, 4096), 28672 * 4096, "linear", sparse(PLAIN), "gate+up", 0.5)
    names = [kernel.name for kernel, _ in only(whole).sparse.kernels]
    assert names == ["compress", "2:4 matmul", "matmul"]
    halves = only(site("gate"), site("up", dense("rule")))
    assert simplify(only(whole).sparse.seconds - halves.sparse.seconds) == 0
    assert only(whole).sparse.macs == halves.sparse.macs


def test_experts_see_a_token_several_times_and_few_tokens_few_experts():
    experts = Site("down", (128, 2048, 768), 8 * 2048 * 768, "grouped_mm", dense("rule"), "down")
    cost = only(experts)
    assert cost.dense.macs == 8 * 2048 * 768 * T
    assert cost.dense.at(1)["bytes"] == 2 * 8 * (2048 * 768 + 2048 + 768)
    assert cost.dense.at(1000)["bytes"] == 2 * (128 * 2048 * 768 + 8000 * (2048 + 768))


def test_a_projection_that_is_never_called_costs_nothing():
    cost = only(site("q", macs=0))
    assert cost.dense.at(7) == cost.sparse.at(7) == {"macs": 0, "bytes": 0, "seconds": 0}
    assert (cost.speedup(7), cost.break_even) == (1, None)
    assert cost_of([], ROUND).speedup(7) == 1


# ---- against the estimate that the kernels were planned by ----

H100 = Rates(
    "H100, as assumed",
    "dense 790 TFLOP/s, 2:4 from 1000 to 1200, 75 % of 3 TB/s for the selection, 3 µs a kernel",
    {"bfloat16": 790e12},
    {"bfloat16": 1000e12},
    3e12,
    3e-6,
    0.75,
)
"""Estimated before any kernel ran; this model leaves out its waves of tiles."""


@pytest.mark.parametrize(
    ("role", "tokens", "matmul", "compress", "low", "high"),
    [
        ("gate", 512, None, 5, 1.17, 1.37),
        ("gate", 2048, 308, 14, 1.19, 1.41),
        ("gate", 8192, 1221, 49, 1.20, 1.43),
        ("down", 512, None, 13, 1.05, 1.22),
        ("down", 2048, 308, 43, 1.07, 1.25),
        ("down", 8192, 1221, 166, 1.08, 1.26),
        ("q", 512, None, 5, 0.98, 1.10),
        ("q", 2048, 90, 14, 1.05, 1.21),
        ("q", 8192, 351, 49, 1.07, 1.25),
    ],
)
def test_the_estimate_comes_out(role, tokens, matmul, compress, low, high):
    slow, fast = (only(site(role), machine=machine) for machine in (H100, faster()))
    within = 0.02 if tokens > 512 else 0.04  # of 512 tokens a wave of tiles is half empty
    if matmul is not None:
        assert slow.dense.at(tokens)["seconds"] * 1e6 == pytest.approx(matmul, rel=0.02)
    (made, _), _ = slow.sparse.kernels
    assert float(made.seconds.subs(T, tokens)) * 1e6 == pytest.approx(compress, rel=0.02, abs=1)
    assert slow.speedup(tokens) == pytest.approx(low, rel=within)
    assert fast.speedup(tokens) == pytest.approx(high, rel=within)


def faster() -> Rates:
    return replace(H100, sparse={"bfloat16": 1200e12})


# ---- against the report ----


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "gpt2"])
def test_coverage_and_removed_macs_are_those_of_the_report(name):
    model, inputs = ZOO[name].build()
    options = {"pattern": "2:4", "score": "magnitude"}
    with torch.inference_mode():
        torch.compile(model, backend="amber_eager", options=options)(**inputs)
    report = Report.merge(last_reports())
    cost = cost_of(report, ROUND)
    assert (cost.coverage, cost.removed) == (report.coverage, report.removed)
    assert report.coverage > 0 or name == "gpt2"
    counted = [site for site in report.sites if site.role not in ("head", "router")]
    assert float(cost.dense.macs / T) == pytest.approx(sum(site.macs for site in counted))
    served = [one for one in counted if why_masked(one, ROUND, "bfloat16") is None]
    left = sum(one.macs * one.share / 2 for one in served)
    assert float((cost.dense.macs - cost.sparse.macs) / T) == pytest.approx(left)
    assert served or name != "llama"


def test_what_a_sparse_unit_serves_is_not_executed():
    cost = cost_of(llama(), ROUND)
    assert 1 - float(cost.sparse.macs / cost.dense.macs) == pytest.approx(cost.removed)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"decision": dense("rule")}, "it is dense"),
        ({"decision": sparse(Settings("4:8"))}, "no sparse unit for 4:8 in bfloat16"),
        ({"operator": "addmm"}, "addmm has no sparse kernel"),
        ({"shape": (8, 4096, 4096), "operator": "grouped_mm"}, "grouped_mm has no sparse kernel"),
        ({"decision": sparse(Settings(correction="variance"))}, "the variance correction"),
        ({"decision": sparse(Settings(correction="norm"))}, None),
        ({"shape": (4096, 4128)}, "multiples of 8 and 64, not 4096, 4128"),
        ({"shape": (4104, 4096), "share": 0.5}, "multiples of 8 and 64, not 4104, 4096"),
    ],
)
def test_what_a_sparse_unit_serves(changes, reason):
    found = why_masked(replace(site("q"), **changes), ROUND, "bfloat16")
    assert found == reason or (reason is not None and reason in str(found))


def test_heads_and_routers_are_listed_and_not_counted():
    report = Report([GraphReport("prefill", llama(layers=1))])
    cost = cost_of(report, ROUND)
    assert [group.counted for group in cost.groups] == [True] * 7 + [False]
    assert (cost.coverage, cost.removed) == (report.coverage, report.removed)
    assert cost.dense.macs == sum(n * k for n, k in SHAPES.values()) * T


def test_masked_macs_are_removed_from_the_sum_and_still_executed():
    cost = cost_of(llama("4:8"), ROUND)
    assert cost.removed == cost.coverage / 2 > 0
    assert cost.sparse.macs == cost.dense.macs


# ---- groups and totals ----


def test_layers_that_are_alike_are_one_group():
    cost = cost_of(llama(), "H100 SXM")
    assert [group.label for group in cost.groups] == [
        *(f"{role} {n}x{k}" for role, (n, k) in SHAPES.items()),
        "head 128256x4096",
    ]
    assert {len(group.sites) for group in cost.groups[:-1]} == {32}
    assert cost.group_of("layers.7.down") is cost.group_of("down 4096x14336")
    assert simplify(cost.dense.seconds - sum(g.dense.seconds for g in cost.groups[:-1])) == 0
    assert simplify(cost.groups[0].sparse.seconds - 32 * cost.groups[0].one.sparse.seconds) == 0


def test_what_is_decided_otherwise_is_another_group():
    one, other = site("q"), replace(site("q", dense("plan")), name="layers.1.q")
    assert [group.label for group in only(one, other).groups] == [
        "q 4096x4096",
        "q 4096x4096 #2",
    ]


def test_a_projection_without_a_role_goes_by_its_name():
    mix = replace(site("q"), role="unknown", name="tower.mix")
    assert only(mix).groups[0].label == "mix 4096x4096"


def test_the_formula_of_a_projection():
    cost = cost_of(llama(), ROUND)
    assert cost.formula("layers.3.q") == cost.groups[0].one.sparse.seconds
    assert cost.formula("q 4096x4096", dense=True) == cost.groups[0].one.dense.seconds
    assert cost.formula("layers.3.k") == cost.formula("layers.3.k", dense=True)
    assert cost.formula("layers.3.q").free_symbols == {T}
    with pytest.raises(OptionError, match=r"unknown projection 'layers.3.r'; did you mean"):
        cost.formula("layers.3.r")


# ---- what it is for ----


@pytest.mark.parametrize("machine", ["H100 SXM", "H200", "A100 SXM", "L40S", "RTX 4090"])
def test_the_break_even_is_what_a_scan_finds(machine):
    cost = cost_of(llama(), machine)
    for both in (cost, *(group.one for group in cost.groups if group.settings)):
        least = both.break_even
        assert least is not None
        assert [both.speedup(count) > 1 for count in (least - 1, least, least + 1)] == [
            False,
            True,
            True,
        ]
        assert all(both.speedup(count) > 1 for count in (2 * least, 5 * least, 100 * least))


def test_a_share_of_other_work_is_amdahls():
    cost = cost_of(llama(), "H100 SXM")
    gain = cost.speedup(8192)
    assert 1.1 < gain < 1.3
    assert cost.speedup(8192, other=0.5) == pytest.approx(2 / (1 + 1 / gain))
    assert cost.speedup(8192, other=0.0) == gain


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, None])
def test_tokens_are_a_whole_number(tokens):
    cost = cost_of(llama(layers=1), ROUND)
    for ask in (cost.speedup, cost.dense.at):
        with pytest.raises(OptionError, match="must be a whole number >= 1"):
            ask(tokens)


@pytest.mark.parametrize("other", [-0.1, 1, 1.5, True, float("nan"), "half"])
def test_other_is_a_share(other):
    with pytest.raises(OptionError, match=f"other={other!r} must be a share"):
        cost_of(llama(layers=1), ROUND).speedup(512, other=other)


def test_an_unknown_machine_and_dtype():
    with pytest.raises(OptionError, match="unknown machine 'H100 SMX'; did you mean 'H100 SXM'"):
        cost_of([], "H100 SMX")
    with pytest.raises(OptionError, match="unknown dtype for round: 'float16'; did you mean"):
        cost_of([], ROUND, torch.float16)


def test_json():
    cost = cost_of(llama(), "H100 SXM")
    data = json.loads(json.dumps(cost.to_json((512, 2048))))
    assert Rates.from_json(data["rates"]) == cost.rates
    assert (data["coverage"], data["break_even"]) == (cost.coverage, cost.break_even)
    assert set(data["speedup"]) == {"512", "2048"}
    q = data["groups"][0]
    assert (q["label"], len(q["names"]), q["shape"]) == ("q 4096x4096", 32, [4096, 4096])
    assert q["settings"]["pattern"] == "2:4"
    assert [kernel["name"] for kernel in q["sparse_kernels"]] == ["compress", "2:4 matmul"]
    assert q["sparse_kernels"][0]["bytes"]["metadata"] == "512.0*T"
    assert q["dense_seconds"].startswith("32.0*Max(")
