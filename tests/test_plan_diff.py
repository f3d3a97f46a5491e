"""What differs between two plans, in words and numbers."""

import pytest
import torch

from amber_compile import Plan, Settings
from amber_compile.plan import Move, PlannedSite
from amber_compile.plan_diff import columns
from amber_compile.plan_tensors import PlanTensors
from amber_compile.plan_totals import PlanTotals, size
from amber_compile.quantization import Quantization

DOWN, GATE, HEAD = "layers.0.down_proj", "layers.0.gate_up_proj", "lm_head"
FACTOR = torch.arange(1.0, 17.0)
SITES = {
    DOWN: PlannedSite((8, 16), Settings("2:4"), Quantization()),
    GATE: PlannedSite((32, 8), Settings("4:8", part="gate")),
    "layers.0.k_proj": PlannedSite((8, 8), "rule: dense"),
    HEAD: PlannedSite((96, 8), "rule: heads stay dense", "rule: heads"),
}
MADE = {"amber": "0.1.0", "by": "me"}
TENSORS = PlanTensors({DOWN: {"factor": FACTOR, "weight": torch.ones(8, 16)}})
PLAN = Plan(SITES, MADE, TENSORS)


def words(name: str, before: Plan, after: Plan) -> list[str]:
    return [str(one) for one in before.diff(after).sites.get(name, ())]


def with_site(site: PlannedSite, name: str = DOWN) -> Plan:
    return Plan({**SITES, name: site}, MADE, TENSORS)


def test_a_plan_does_not_differ_from_itself():
    assert PLAN.diff(PLAN).equal
    assert str(PLAN.diff(PLAN)).startswith("equal\n")
    again = Plan(SITES, MADE, TENSORS.to_dict())  # of another save, and of the same values
    assert again != PLAN
    assert PLAN.diff(again).equal


CHANGES = {
    "pattern": (PlannedSite((8, 16), Settings("4:8"), Quantization()), ["pattern: 2:4 -> 4:8"]),
    "two settings": (
        PlannedSite((8, 16), Settings("2:4", "magnitude", "norm"), Quantization()),
        ["score: weight_norm -> magnitude", "correction: none -> norm"],
    ),
    "a flag": (
        PlannedSite((8, 16), Settings("2:4", output_scale=True), Quantization()),
        ["output_scale: none -> True"],
    ),
    "quantisation": (
        PlannedSite((8, 16), Settings("2:4"), Quantization("int8", "smoothquant", 0.5)),
        ["smooth: none -> smoothquant", "alpha: none -> 0.5"],
    ),
    "why not quantised": (
        PlannedSite((8, 16), Settings("2:4"), "sensitive"),
        ["quantize: int8 -> 16 bit: sensitive"],
    ),
    "not asked": (PlannedSite((8, 16), Settings("2:4")), ["quantize: int8 -> none"]),
    "moves": (
        PlannedSite((8, 16), Settings("2:4"), Quantization(), (Move("down.weight", 1, 0, 16),)),
        ["permutes: none -> down.weight from 0"],
    ),
}


@pytest.mark.parametrize(("site", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_settings_field_by_field(site, expected):
    assert words(DOWN, PLAN, with_site(site)) == expected
    assert list(PLAN.diff(with_site(site)).sites) == [DOWN]


def test_dense_or_sparse():
    told = words(DOWN, PLAN, with_site(PlannedSite((8, 16), "too sensitive", Quantization())))
    assert told[0] == "input: sparse -> dense: too sensitive"
    assert "pattern: 2:4 -> none" in told


def test_sites_of_one_plan_only():
    less = Plan({name: site for name, site in SITES.items() if name != HEAD}, MADE, TENSORS)
    told = "projection: [96, 8], dense: rule: heads stay dense -> none"
    assert words(HEAD, PLAN, less) == [told]
    assert words(HEAD, less, PLAN) == ["projection: none -> " + told[12:-8]]


def test_tensors_by_value():
    scaled = PlanTensors({DOWN: {"factor": FACTOR * 1.5, "output_bias": torch.ones(8)}})
    assert words(DOWN, PLAN, Plan(SITES, MADE, scaled)) == [
        "tensor factor: F32 [16] -> F32 [16], differs by 0.5 of its norm",
        "tensor weight: F32 [8, 16] -> none",
        "tensor output_bias: none -> F32 [8]",
    ]
    halves = PlanTensors({DOWN: {"factor": FACTOR, "weight": torch.ones(8, 16).bfloat16()}})
    assert words(DOWN, PLAN, Plan(SITES, MADE, halves)) == [
        "tensor weight: F32 [8, 16] -> BF16 [8, 16]"
    ]


def test_permutations_by_how_many_moved():
    order = torch.arange(16).int()
    other = order.clone()
    other[:2] = other[:2].flip(0)
    one, two = (Plan(SITES, MADE, {DOWN: {"permutation": it}}) for it in (order, other))
    (told,) = words(DOWN, one, two)
    assert told.endswith("differs in 2 of 16 values")


def test_tensors_of_one_save_are_not_read(monkeypatch):
    monkeypatch.setattr(PlanTensors, "get", None)
    assert PLAN.diff(Plan({**SITES, HEAD: PlannedSite((96, 8), "no")}, MADE, TENSORS)).sites


def test_who_made_it_is_told_and_makes_no_difference():
    diff = PLAN.diff(Plan(SITES, {"amber": "0.2.0", "text": "a.txt"}, TENSORS))
    assert diff.equal
    told = ["amber: 0.1.0 -> 0.2.0", "by: me -> none", "text: none -> a.txt"]
    assert [str(one) for one in diff.made] == told
    assert all(f"    {line}" in str(diff) for line in told)


def test_alike_sites_are_told_together():
    sites = {f"layers.{at}.down_proj": PlannedSite((8, 16), Settings()) for at in range(3)}
    wider = {name: PlannedSite((8, 16), Settings("4:8")) for name in sites}
    text = str(Plan(sites).diff(Plan(wider)))
    assert text.startswith(
        "3 of 3 projections differ\n\npattern: 2:4 -> 4:8\n"
        "    layers.0.down_proj\n    layers.1.down_proj\n    layers.2.down_proj\n\n"
    )


def test_json():
    data = PLAN.diff(with_site(CHANGES["pattern"][0])).to_json()
    assert data["equal"] is False
    assert data["sites"] == {DOWN: [{"what": "pattern", "before": "2:4", "after": "4:8"}]}
    assert data["before"]["sparse"] == data["after"]["sparse"] == 2
    assert data["made"] == []


# ---- totals ----


def test_totals():
    totals = PlanTotals.of(PLAN)
    weights = 8 * 16 + 32 * 8 + 8 * 8  # the head does not count
    assert (totals.sites, totals.sparse, totals.quantized) == (4, 2, 1)
    assert totals.coverage == pytest.approx((8 * 16 + 16 * 8) / weights)
    assert totals.removed == pytest.approx((8 * 16 + 16 * 8) / 2 / weights)
    assert totals.quantized_share == pytest.approx(8 * 16 / weights)
    assert (totals.tensors, totals.nbytes, totals.weight_bytes) == (2, 64 + 512, 512)
    assert PlanTotals.of(Plan({})).coverage == 0.0


def test_sizes_and_columns():
    assert [size(one) for one in (0, 999, 1000, 20_185_088, 3_210_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "20.2 MB",
        "3.2 GB",
    ]
    assert columns([("a", "b"), ("long", "")]) == ["a      b", "long"]
