"""Which tile is best?  Every tile of the two kernels, per kind, shape and token count.

    python benchmarks/gpu.py --tune                              writes results/gpu_tiles.json

A candidate replaces what the kernel's own ``choose`` answers, and is checked like any variant. They
are the tiles of ``kernels/cuda/tiles.py``, the deepest pipelines of the same sizes that shared
memory holds, in slots of one and two stages, and other walks over the first two; for mma.sp, all
that it has. ``chosen`` marks what the table has today: the rows are what it is to be filled from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from gpu_gemm import compare, head, operands
from gpu_operands import KINDS, SHAPES, Inputs, Shape
from gpu_variants import AMBER, MULTIPLY, Variant
from timing import Clock
from torch import Tensor
from tqdm import tqdm

TOKENS = (2048, 8192, 512, 128)
PAIRS = (1, 2)
GROUPS = (4, 8, 16, 32)
Row = dict[str, Any]


def wgmma_tiles(kind: str) -> list[Any]:
    """Return the candidates for wgmma.sp: the table's tiles, then what is like them."""
    from amber_compile.kernels.cuda.tiles import TABLE
    from amber_compile.kernels.cuda.wgmma_sp_instruction import Tile

    table = [row.tile for row in TABLE if kind in row.kinds]
    deep = [
        replace(
            deepest(Tile, columns=tile.columns, strips=tile.strips, pair=pair), group=tile.group
        )
        for tile in table
        for pair in PAIRS
    ]
    walks = [replace(tile, group=group) for tile in table[:2] for group in GROUPS]
    return list(dict.fromkeys([*table, *deep, *walks]))


def deepest(make: Any, most: int = 16, **sizes: int) -> Any:
    """Return the tile of these sizes with the most stages that are legal."""
    for stages in range(most, 0, -1):
        try:
            return make(stages=stages, **sizes)
        except ValueError:
            continue
    raise ValueError(f"no tile of {sizes} fits")


def candidates(kind: str) -> list[tuple[ModuleType, Any]]:
    """Return (kernel module, tile) of everything that multiplies operands of a kind."""
    from amber_compile.kernels.cuda import mma_sp, wgmma_sp
    from amber_compile.kernels.cuda.mma_sp_layout import CONFIGURATIONS

    found: list[tuple[ModuleType, Any]] = [(wgmma_sp, tile) for tile in wgmma_tiles(kind)]
    if kind in mma_sp.KINDS.values():
        found += [(mma_sp, tile) for tile in CONFIGURATIONS]
    return found


def multiply_with(inputs: Inputs, kernel: ModuleType, tile: Any, kind: str) -> Tensor:
    """Launch a kernel with a tile of our choice."""
    values, metadata, row_scale = inputs.compressed(kind)
    weight, col_scale = inputs.weights.operand(kind)
    rows = None if col_scale is None else row_scale
    before = kernel.choose
    kernel.choose = lambda *_: tile  # type: ignore[attr-defined]  # as its tests do
    try:
        y: Tensor = kernel.launch(values, metadata, weight, None, rows, col_scale)
    finally:
        kernel.choose = before  # type: ignore[attr-defined]
    return y


def ways(kind: str) -> list[Variant]:
    """Return the candidates as variants; the note is the tile."""
    return [
        Variant(AMBER, kind, MULTIPLY, partial(multiply_with, kernel=kernel, tile=tile, kind=kind),
                f"{kernel.__name__.rpartition('.')[2]} {tile}")
        for kernel, tile in candidates(kind)
    ]  # fmt: skip


def tune(
    clock: Clock,
    device: torch.device,
    cache: int,
    deadline: float = float("inf"),
    shapes: Sequence[Shape] = SHAPES[:4],
    tokens: Sequence[int] = TOKENS,
) -> Iterator[Row]:
    """Yield one row per kind, shape, token count and tile."""
    todo = [(kind, count, shape) for kind in KINDS for count in tokens for shape in shapes]
    for kind, count, shape in tqdm(todo, desc="tiles", leave=False):
        if time.monotonic() > deadline:
            yield head(shape, count) | {"kind": kind, "skipped": "out of time"}
            continue
        sets = operands(shape, count, device, cache)
        now = chosen(kind, shape, count, device)
        for row in compare(clock, sets, ways(kind)):
            yield head(shape, count) | row | {"chosen": row["note"] == f"wgmma_sp {now}"}


def chosen(kind: str, shape: Shape, tokens: int, device: torch.device) -> object:
    """Return the tile that the table of wgmma.sp has for a product."""
    from amber_compile.kernels.cuda.tiles import choose

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return choose(kind, tokens, shape.outputs, shape.channels, processors)


def best_tiles(rows: Sequence[Row]) -> list[Row]:
    """Return the fastest row of each kind, shape and token count, and its gain on the chosen."""
    by_point: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            key = (row["kind"], row["channels"], row["outputs"], row["tokens"])
            by_point.setdefault(key, []).append(row)
    found = []
    for timed in by_point.values():
        best = min(timed, key=lambda row: row["seconds"])
        now = next((row["seconds"] for row in timed if row["chosen"]), None)
        found.append({**best, "gain": now / best["seconds"] if now else None})
    return found
