"""The table of tiles: what is chosen is legal and reasonable, and its sources are stated."""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from amber_compile.kernels.cuda.tiles import (
    ESTIMATED,
    TABLE,
    _clocks,
    choose,
)
from amber_compile.kernels.cuda.wgmma_sp_instruction import SHARED_MEMORY, Tile

KINDS = ("bf16", "fp16", "int8", "fp8")
H100 = 132


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row.tile))
def test_a_row_is_legal_and_says_where_it_comes_from(row):
    assert row.tile.bytes <= SHARED_MEMORY
    assert row.kinds
    assert row.source == ESTIMATED or "results" in row.source


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processors", [1, 78, 114, H100])
@pytest.mark.parametrize("tokens", [1, 17, 512, 131072])
@pytest.mark.parametrize(("outputs", "channels"), [(8, 64), (4096, 4096), (14336, 4096)])
def test_every_product_has_a_tile(kind, processors, tokens, outputs, channels):
    tile = choose(kind, tokens, outputs, channels, processors)
    assert any(tile == row.tile and kind in row.kinds for row in TABLE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_product_has_a_large_tile(kind):
    tile = choose(kind, 8192, 14336, 4096, H100)
    assert tile.rows * tile.columns == 128 * 256


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_product_is_spread_over_the_multiprocessors(kind):
    """128 x 256 would make 16 tiles of it, and leave 116 of 132 multiprocessors idle."""
    tile = choose(kind, 128, 4096, 4096, H100)
    assert tile.rows * tile.columns < 128 * 256


def test_a_wave_more_costs_a_wave():
    tile = Tile(256, 4)
    one, two = (_clocks(tile, "bf16", 128, 256 * n, 4096, H100) for n in (H100, H100 + 1))
    assert two == 2 * one


def test_the_model_counts_what_a_stage_needs():
    """One block of 128 x 256 on an idle device, 64 channels: 144 clocks an instruction from shared
    memory, four of them; 41984 bytes from the L2 cache at 64 a clock are more."""
    clocks = [_clocks(Tile(256, 4), "bf16", 128, 256, k, H100) for k in (64, 128)]
    assert clocks[1] - clocks[0] == max(4 * 144, (8192 + 32768 + 1024) / 64)
