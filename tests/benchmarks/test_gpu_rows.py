"""What is measured: shapes, bytes, tiles, and a dry run of the parts on a CPU."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import gpu_gemm
import pytest
import torch
from gpu_compress import compress_one, compressed_bytes
from gpu_exact import Block
from gpu_operands import DECISIVE, KINDS, SHAPES, TOKENS, Shape, points
from gpu_tune import multiply_with, tune, ways, wgmma_tiles
from gpu_variants import AMBER, DENSE, MULTIPLY, variants
from gpu_verdicts import crossovers, with_ratios
from timing import HostClock

CPU = torch.device("cpu")
TINY = Shape("tiny", 128, 144)


def test_every_mlp_shape_meets_every_token_count():
    found = points()
    assert len(set(found)) == len(found) == 4 * len(TOKENS) + 2 * 3
    assert sorted(DECISIVE) == list(TOKENS)
    assert {str(shape) for shape, tokens in found[:6] if tokens == 2048} == set(map(str, SHAPES))


def test_the_bytes_of_a_compression():
    assert compressed_bytes(16, 64, "bf16", False) == 2048 + 1024 + 128 + 256
    assert compressed_bytes(17, 64, "int8", True) == 2176 + 544 + 256 + 256 + 68


def test_products_of_one_shape():
    rows = list(gpu_gemm.point(HostClock(), CPU, 1000, TINY, 48, ("bf16", "int8")))
    assert not [row for row in rows if "error" in row]
    assert {(row["library"], row["kind"]) for row in rows} == {
        *((DENSE, kind) for kind in ("bf16", "int8", "fp8")),
        *((AMBER, kind) for kind in ("bf16", "int8")),
    }
    row = with_ratios(rows)[0]
    assert row["per_second"] * row["seconds"] == pytest.approx(2 * 48 * 128 * 144)


def test_a_point_for_which_there_is_no_time_is_skipped():
    of = [(TINY, 16)]
    (row,) = gpu_gemm.gemm(HostClock(), CPU, 1000, deadline=0.0, of=of)
    assert row["skipped"] == "out of time"
    assert crossovers(with_ratios([row])) == []


def test_compressions_of_one_activation():
    rows = list(compress_one(HostClock(), CPU, 1000, 48, 128))
    assert [row["operation"] for row in rows][:2] == ["compress bf16", "compress bf16, norm"]
    assert not [row for row in rows if "error" in row]
    assert all("copy_seconds" in row for row in rows)


def test_a_wrong_compression_is_not_timed(monkeypatch):
    monkeypatch.setattr(Block, "compression_differs", lambda *_: "values")
    rows = list(compress_one(HostClock(), CPU, 1000, 48, 128, ("int8",)))
    errors = [row["error"] for row in rows if str(row["operation"]).startswith("compress")]
    assert errors == ["not the reference's: int8 values"] * 2


def test_every_candidate_tile_is_legal_and_runs_as_asked(inputs, monkeypatch):
    pytest.importorskip("triton")
    from amber_compile.kernels.cuda.tiles import TABLE

    for kind in KINDS:
        found = wgmma_tiles(kind)
        assert len(set(found)) == len(found)
        assert {row.tile for row in TABLE if kind in row.kinds} <= set(found)
    kernel = ModuleType("kernel")
    kernel.choose = lambda *_: "the table's"
    kernel.launch = lambda *operands: (kernel.choose(), len(operands))
    assert multiply_with(inputs, kernel, found[0], "int8") == (found[0], 6)
    assert kernel.choose() == "the table's"
    assert len(ways("fp8")) == len(wgmma_tiles("fp8"))  # mma.sp has none
    assert len(ways("bf16")) > len(wgmma_tiles("bf16"))


def test_tiles_are_timed_beside_the_chosen_one(monkeypatch):
    ours = [v for v in variants(CPU) if (v.library, v.stage) == (AMBER, MULTIPLY)]
    notes = {"bf16": "wgmma_sp a", "int8": "wgmma_sp b", "fp8": "mma_sp a"}
    tiles = {v.kind: [replace(v, note=notes[v.kind])] for v in ours}
    monkeypatch.setattr("gpu_tune.ways", tiles.__getitem__)
    monkeypatch.setattr("gpu_tune.chosen", lambda *_: "a")
    rows = list(tune(HostClock(), CPU, 1000, shapes=[TINY], tokens=[16]))
    assert [(row["kind"], row["chosen"]) for row in rows] == [
        ("bf16", True),
        ("int8", False),
        ("fp8", False),
    ]
    assert not [row for row in rows if "error" in row]
    late = list(tune(HostClock(), CPU, 1000, deadline=0.0, shapes=[TINY], tokens=[16]))
    assert [row["skipped"] for row in late] == ["out of time"] * 3
