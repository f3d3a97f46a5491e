"""Ratios, crossovers and targets, from rows that were made up."""

from __future__ import annotations

import pytest
from gpu_compress import LARGE
from gpu_rows import ROWS, row
from gpu_tables import tiles as tiles_table
from gpu_tune import best_tiles
from gpu_variants import AMBER, COMPRESS
from gpu_verdicts import crossover, crossovers, verdicts, with_ratios, with_shares


@pytest.mark.parametrize(
    ("ratios", "least"),
    [
        ({}, None),
        ({128: 2.0, 512: 2.0}, 128),
        ({128: 0.9, 512: 1.1, 2048: 1.2}, 512),
        ({128: 1.5, 512: 0.9, 2048: 1.2}, 2048),
        ({128: 1.5, 512: 1.0}, None),
    ],
)
def test_the_crossover_is_followed_by_gains_only(ratios, least):
    assert crossover(ratios) == least


def test_ratios_are_to_the_best_dense_product_from_the_same_start():
    found = {
        (r["library"], r["kind"], r["stage"]): r for r in with_ratios(ROWS) if r["library"] == AMBER
    }
    whole = found[AMBER, "int8", COMPRESS]
    assert whole["to_bf16"] == pytest.approx(2.8 / 1.25)
    assert whole["to_own_kind"] == pytest.approx(1.8 / 1.25)
    assert found[AMBER, "int8", "multiply"]["to_own_kind"] == pytest.approx(1.7)
    assert "to_bf16" not in found[AMBER, "fp8", COMPRESS]


def test_verdicts_name_the_worst_and_what_was_not_measured():
    found = {v["target"]: v for v in verdicts(with_ratios(ROWS), [], None)}
    first = found["bf16, 4096→14336, of dense bf16"]
    assert first["worst"] == pytest.approx(1.4)
    assert first["met"]
    assert first["where"] == "T=2048 4096→14336"
    assert not found["bf16, 14336→4096, of dense bf16"]["met"]
    assert found["int8, MLP shapes, of dense int8"]["met"]
    large = {"operation": "compress bf16", "tokens": 8192, "channels": LARGE // 8192}
    met, missed = (verdicts([], [large | {"bandwidth": b}], 100.0)[-3] for b in (75.0, 74.0))
    assert (met["met"], missed["met"], missed["worst"]) == (True, False, 0.74)


def test_a_failed_row_that_a_target_speaks_of_means_not_met():
    rows = [*ROWS, row(AMBER, "bf16", COMPRESS, None, tokens=4096)]
    first = verdicts(with_ratios(rows), [], None)[0]
    assert first["worst"] == pytest.approx(1.4)
    assert not first["met"]


def test_the_algorithms_of_cusparselt_are_one_variant():
    names = {r["variant"]: r["crossover"] for r in crossovers(with_ratios(ROWS))}
    assert names["cuSPARSELt bf16 compress+multiply"] == 2048
    assert len([name for name in names if "cuSPARSELt" in name]) == 1


def test_the_fastest_tile_is_compared_with_the_chosen_one():
    tiles = [
        row(AMBER, "bf16", "multiply", 2.0, note="wgmma_sp a", chosen=True),
        row(AMBER, "bf16", "multiply", 1.6, note="wgmma_sp b", chosen=False),
        row(AMBER, "bf16", "multiply", None, note="wgmma_sp c", chosen=False),
        row(AMBER, "int8", "multiply", 1.0, note="wgmma_sp b", chosen=False),
    ]
    found = best_tiles(tiles)
    assert [(r["note"], r["gain"]) for r in found] == [("wgmma_sp b", 1.25), ("wgmma_sp b", None)]
    assert tiles_table({"tune": tiles}).row_count == 2


def test_shares_are_of_the_peak_of_the_own_kind():
    rows = with_shares(
        [row(AMBER, "bf16", COMPRESS, 2.0), row(AMBER, "int8", COMPRESS, 1.0)],
        {"bf16": 4e11, "int8": None},
    )
    assert rows[0]["of_peak"] == 1.25
    assert "of_peak" not in rows[1]
