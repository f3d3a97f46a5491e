"""Which tile of y wgmma.sp computes at a time.

Nothing here has been measured. A tile's ``source`` says so, until benchmarks/gpu_tune.py gives
another. Of the tiles of the table that one is chosen for which this model expects the least time:

    time    = waves · (stages · stage + STORE)        waves = ⌈tiles of y / multiprocessors⌉
    stage   = max(tensor, cache)                      clocks, for 64 channels of 16 bit, 128 of 8
    tensor  = 4 · strips · max(columns / 2, (64 · columns + 2048) / 128)
    cache   = bytes of a stage · active / L2          active ≤ multiprocessors, at most PORT each

``tensor``: a stage is four instructions a strip pair (two warpgroups, two steps), each takes
``columns`` / 2 clocks of the tensor cores or what shared memory needs at 128 bytes a clock to hand
over 64 bytes of each weight row and 32 of each of 64 value rows. ``cache``: every block loads its
own values, weight and metadata; there is no multicast. So the tile of 256 x 128 moves a fifth less
than that of 128 x 256, and either is likely to wait for the L2 cache rather than for the tensor
cores: this is the first thing to measure.
"""

from __future__ import annotations

from dataclasses import dataclass

from amber_compile.kernels.cuda.wgmma_sp_instruction import STRIP, Tile

ESTIMATED = "estimated by the model of this file, not measured"

# ---- tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A tile that may be chosen, for which kinds of operands, and where that was found out."""

    tile: Tile
    kinds: tuple[str, ...]
    source: str = ESTIMATED


WIDE, NARROW = ("bf16", "fp16"), ("int8", "fp8")
TABLE = (
    Row(Tile(128, stages=6, strips=2, group=4), WIDE + NARROW),
    Row(Tile(256, stages=4, pair=2), WIDE),
    Row(Tile(256, stages=5), NARROW),  # a slot has as many channels as two of 16 bit
    Row(Tile(128, stages=8, pair=2), WIDE + NARROW),
    Row(Tile(64, stages=12, pair=2), WIDE + NARROW),
)

L2 = 132 * 32  # bytes a clock for all of an H100: estimated
PORT = 64  # bytes a clock for one multiprocessor: estimated
STORE = 2000  # clocks to store a tile and to start the next: estimated


def choose(kind: str, tokens: int, outputs: int, channels: int, processors: int) -> Tile:
    """Return the tile for a product [tokens, channels] x [outputs, channels] on one device."""
    rows = [row for row in TABLE if kind in row.kinds]
    clocks = [_clocks(row.tile, kind, tokens, outputs, channels, processors) for row in rows]
    return rows[clocks.index(min(clocks))].tile


def _clocks(
    tile: Tile, kind: str, tokens: int, outputs: int, channels: int, processors: int
) -> float:
    """Return what the model expects a product to take."""
    tiles = -(-tokens // tile.rows) * -(-outputs // tile.columns)
    active = min(tiles, processors)
    blocks = 1 if kind in WIDE else 2  # of 64 channels, a stage
    tensor = 4 * tile.strips * max(tile.columns / 2, (STRIP * tile.columns + 2048) / 128)
    loaded = 64 * tile.rows + 128 * tile.columns + 8 * tile.rows * blocks
    stage = max(tensor, loaded * max(active / L2, 1 / PORT))
    slots = -(-channels // (64 * blocks * tile.pair))
    return -(-tiles // processors) * (slots * tile.pair * stage + STORE)
