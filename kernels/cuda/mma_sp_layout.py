"""What mma_sp.py is parametrised by: tiles, register and shared-memory layouts, the instruction.

    lane = 4g + t     register     element of a fragment, in 32-bit words
    values 16 x 8     r = 0..3     row g + 8(r & 1), word t + 4(r >> 1)
    weight 8 x 16     r = 0..3     row g, word t + 4r
    y 16 x 8          i = 0..3     row g + 8(i >> 1), column 2t + (i & 1)

Accumulators are a tensor [16-row tiles, 8-column tiles, 32 lanes, 4 registers], so that an
elementwise assembly statement over four elements is one instruction of one warp. Warps are numbered
fastest along the columns. Metadata: two_four.py; the selector tells which half of the lanes holds
what an instruction on 16-bit operands reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}

# ---- tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """The part of y that one program computes, by which warps, through how deep a pipeline."""

    rows: int  # tokens
    columns: int  # outputs
    stages: int
    warps_m: int = 2
    warps_n: int = 2
    words: int = 16  # of a row of values, in a stage

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    def shared_memory(self, kind: str) -> int:
        """Return the bytes of all stages."""
        metadata: int = self.rows // 16 * 32 * (self.words // (8 * steps(kind)))
        words = self.rows * self.words + self.columns * 2 * self.words + metadata
        return 4 * self.stages * words


# The largest first. Register and shared-memory use: tests/kernels/cuda/test_cuda_mma_sp_aot.py.
CONFIGURATIONS = (
    Configuration(128, 128, stages=4),
    Configuration(128, 128, stages=3),
    Configuration(64, 128, stages=4),
    Configuration(64, 64, stages=4),
)
PROGRAMS = 128  # that keep a device busy: about as many as it has multiprocessors


def choose(kind: str, tokens: int, outputs: int, shared_memory: int) -> Configuration:
    """Return the largest tile that fits and of which the product has enough, else the smallest."""
    for configuration in CONFIGURATIONS:
        fits = configuration.shared_memory(kind) <= shared_memory
        if fits and programs(configuration, tokens, outputs) >= PROGRAMS:
            return configuration
    return CONFIGURATIONS[-1]


def programs(configuration: Configuration, tokens: int, outputs: int) -> int:
    """Return the number of tiles of a product."""
    return -(-tokens // configuration.rows) * -(-outputs // configuration.columns)


# ---- layouts -------------------------------------------------------------------------------------


@gluon.constexpr_function
def steps(kind):
    """Return how many instructions cover the 64 channels that a word of metadata describes."""
    return 1 if kind == "int8" else 2


@gluon.constexpr_function
def doublings(start, end):
    """Return start, 2 start, 4 start, ... below ``end``."""
    return [start << i for i in range((end // start).bit_length() - 1)]


@gluon.constexpr_function
def accumulator_layout(rows, columns, warps_m, warps_n):
    """Lay out the accumulators [rows / 16, columns / 8, 32, 4]."""
    tiles = [rows // 16 // warps_m, columns // 8 // warps_n, 1, 4]
    return gl.BlockedLayout(tiles, [1, 1, 32, 1], [warps_m, warps_n, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def matrix_layout(rows, columns, warps_m, warps_n):
    """Lay out the accumulators as a matrix [rows, columns], each where it already is."""
    registers = [[0, 1], [8, 0]]
    registers += [[0, i] for i in doublings(8, columns // warps_n)]
    registers += [[i, 0] for i in doublings(16, rows // warps_m)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [[0, i] for i in doublings(columns // warps_n, columns)]
    warps += [[i, 0] for i in doublings(rows // warps_m, rows)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, columns])


@gluon.constexpr_function
def values_layout(rows, warps_m, warps_n):
    """Lay out words [rows, 8] as fragments of values; warps along the columns hold the same."""
    registers = [[8, 0], [0, 4], *([i, 0] for i in doublings(16, rows // warps_m))]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[0, 0] for _ in doublings(1, warps_n)]
    warps += [[i, 0] for i in doublings(rows // warps_m, rows)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, 8])


@gluon.constexpr_function
def weight_layout(columns, warps_m, warps_n):
    """Lay out words [columns, 16] as fragments of weight; warps along the rows hold the same."""
    registers = [[0, 4], [0, 8], *([i, 0] for i in doublings(8, columns // warps_n))]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[i, 0] for i in doublings(columns // warps_n, columns)]
    warps += [[0, 0] for _ in doublings(1, warps_m)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [columns, 16])


@gluon.constexpr_function
def copy_layout(width, vector, warps):
    """Lay out [rows, width] for accesses of ``vector`` elements to global memory, row by row."""
    lanes = min(32, width // vector)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def shared_layout(words):
    """Lay out rows of ``words`` such that 8 rows of 16 bytes lie in 32 different banks."""
    return gl.SwizzledSharedLayout(4, max(1, 32 // words), min(8, words // 4), [1, 0])


# ---- instruction ---------------------------------------------------------------------------------

SHAPES = {
    "bf16": "m16n8k32.row.col.f32.bf16.bf16.f32",
    "fp16": "m16n8k32.row.col.f32.f16.f16.f32",
    "int8": "m16n8k64.row.col.s32.s8.s8.s32",
}


@gluon.constexpr_function
def instruction(kind, selector):
    """Return PTX: accumulators $0-3 += values $4-7 · weight $8-11, with metadata $16."""
    registers = ("$0, $1, $2, $3", "$4, $5, $6, $7", "$8, $9, $10, $11", "$0, $1, $2, $3")
    operands = ", ".join(f"{{{group}}}" for group in registers)
    name = f"mma.sp::ordered_metadata.sync.aligned.{SHAPES[kind]}"
    return f"{name} {operands}, $16, {selector};"


@gluon.constexpr_function
def constraints(kind):
    """Return the constraints: four elements a thread of values, weight, accumulators, metadata."""
    accumulator = "=r" if kind == "int8" else "=f"
    return ",".join([accumulator] * 4 + ["r"] * 8 + ["0", "1", "2", "3"] + ["r"] * 4)
