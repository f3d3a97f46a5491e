"""What wgmma_sp.py is parametrised by: tiles, layouts, and the text that issues wgmma.sp.

A block computes 128 · ``strips`` x ``columns`` of y at a time: two warpgroups, each with that many
strips of 64 rows. Operands are counted in 32-bit words, so that all kinds look alike. To multiply a
strip one instruction reads 8 words of each row of values and 16 of each row of the weight; a stage
holds the words of two:

    values   [rows, 16]        64 bytes a row, 64-byte swizzle
    weight   [columns, 32]    128 bytes a row, 128-byte swizzle

``pair`` consecutive stages are multiplied at a time; together they are a slot, which has a barrier
for "full" and one for "empty". In shared memory all stages of the weight come first, then all of
the values. Triton does not tell a kernel where it has put what, so the text below relies on that
order, and wgmma_sp_offsets.py reads from the compiled kernel whether it is so.

    of a strip, thread 32 w + 4 g + t has    row, column of the strip
    accumulator i                            16 w + g + 8 (i >> 1 & 1), 8 (i >> 2) + 2 t + (i & 1)
    metadata                                 lane 4 g + t of tile w, see two_four.py
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STRIP = 64  # rows
VALUES_WORDS, WEIGHT_WORDS = 16, 32  # of a row, a stage
VALUES_LAYOUT = gl.NVMMASharedLayout(4 * VALUES_WORDS, 32, 2)
WEIGHT_LAYOUT = gl.NVMMASharedLayout(4 * WEIGHT_WORDS, 32, 2)
SHARED_MEMORY = 227 << 10  # bytes that a block of sm_90 may have
EXCHANGE = 5 << 10  # bytes that Triton takes at most to exchange results, and for its own


@dataclass(frozen=True)
class Tile:
    """How much of y a block computes at a time, and how far ahead operands are loaded."""

    columns: int
    stages: int
    pair: int = 1
    strips: int = 1
    group: int = 8  # rows of tiles that are walked together

    def __post_init__(self) -> None:
        if self.stages % self.pair or self.bytes > SHARED_MEMORY:
            raise ValueError(f"{self}: {self.bytes} bytes; valid: whole slots, {SHARED_MEMORY}")

    @property
    def rows(self) -> int:
        return 2 * STRIP * self.strips

    @property
    def bytes(self) -> int:
        """Shared memory: the stages, two mbarriers for each slot, and what Triton adds."""
        stage = 4 * (self.rows * VALUES_WORDS + self.columns * WEIGHT_WORDS)
        return self.stages * stage + 2 * 8 * self.stages // self.pair + EXCHANGE

    @property
    def values_offset(self) -> int:
        """Where in shared memory the values begin: behind the weight."""
        return self.stages * self.columns * 4 * WEIGHT_WORDS


# ---- layouts -------------------------------------------------------------------------------------


@gluon.constexpr_function
def accumulator_layout(count):
    """Layout of ``count`` accumulators of each thread, [threads, count]."""
    return gl.BlockedLayout([1, count], [32, 1], [4, 1], [1, 0])


@gluon.constexpr_function
def words_layout(count, words):
    """Layout of each thread's words of metadata, as often as ``count`` is: [threads, n, words]."""
    return gl.BlockedLayout([1, count // words, words], [32, 1, 1], [4, 1, 1], [2, 1, 0])


# ---- instruction ---------------------------------------------------------------------------------

INSTRUCTIONS = {  # shape and types, register class of the accumulators, what ends the operands
    "bf16": ("m64n{n}k32.f32.bf16.bf16", "f", ", 1, 1, 0, 0"),
    "fp16": ("m64n{n}k32.f32.f16.f16", "f", ", 1, 1, 0, 0"),
    "int8": ("m64n{n}k64.s32.s8.s8", "r", ""),
    "fp8": ("m64n{n}k64.f32.e4m3.e4m3", "f", ", 1, 1"),
}
SWIZZLES = {64: 2, 128: 1}  # bytes a row: layout type of a matrix descriptor


@gluon.constexpr_function
def words_per_stage(kind):
    """Return how many words of metadata a thread has for a stage: one for 64 channels."""
    return 1 if kind in ("bf16", "fp16") else 2


@gluon.constexpr_function
def multiply_asm(kind, strips, columns, stages, pair, warpgroup):
    """Return the PTX by which a warpgroup multiplies one slot and waits for the results.

    Operands, as many of each as a thread has accumulators: the results; the accumulators, strip by
    strip; the slot's first stage, over and over; the words of metadata, strip by strip, in turn.
    """
    count = strips * columns // 2
    values_row, weight_row = 4 * VALUES_WORDS, 4 * WEIGHT_WORDS
    values_stage, weight_stage = 2 * strips * STRIP * values_row, columns * weight_row
    values_at = stages * weight_stage + warpgroup * strips * STRIP * values_row
    lines = [
        "{ .reg .b32 base, stage, a, b; .reg .b64 da, db, strip;",
        "mov.u32 base, global_smem;",
        f"shfl.sync.idx.b32 stage, ${2 * count}, 0, 0x1f, 0xffffffff;",  # to a uniform register
        f"mad.lo.u32 a, stage, {values_stage}, base; add.u32 a, a, {values_at};",
        f"mad.lo.u32 b, stage, {weight_stage}, base;",
        *_descriptor("a", values_row),
        *_descriptor("b", weight_row),
        "wgmma.fence.sync.aligned;",
    ]
    words = pair * words_per_stage(kind)
    for step in range(2 * pair):
        if step == 2:  # from the second half of a row to the next stage; in units of 16 bytes
            lines.append(f"add.s64 da, da, {(values_stage >> 4) - 2};")
            lines.append(f"add.s64 db, db, {(weight_stage >> 4) - 4};")
        elif step:
            lines.append("add.s64 da, da, 2; add.s64 db, db, 4;")
        word, selector = (step // 2, step % 2) if words_per_stage(kind) == 1 else (step, 0)
        for strip in range(strips):
            lines.append(f"add.s64 strip, da, {strip * STRIP * values_row >> 4};")
            d = ",".join(f"${i}" for i in range(strip * columns // 2, (strip + 1) * columns // 2))
            metadata = f"${3 * count + strip * words + word}"
            lines.append(_instruction(kind, columns, d, metadata, selector))
    # none may be in flight when the registers of the metadata are written again
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }")
    return "\n".join(lines)


@gluon.constexpr_function
def _instruction(kind, columns, d, metadata, selector):
    shape, _, tail = INSTRUCTIONS[kind]
    return (
        f"wgmma.mma_async.sp.sync.aligned.{shape.format(n=columns)} {{{d}}}, strip, db, "
        f"{metadata}, {selector}, 1{tail};"
    )


@gluon.constexpr_function
def _descriptor(name, row):
    """Return PTX that makes ``d<name>``, K-major rows of ``row`` swizzled bytes, of an address."""
    upper = SWIZZLES[row] << 30 | 8 * row >> 4
    return (
        f"shr.u32 {name}, {name}, 4; and.b32 {name}, {name}, 0x3fff;",
        f"or.b32 {name}, {name}, 0x10000; mov.b64 d{name}, {{{name}, {upper}}};",
    )


@gluon.constexpr_function
def multiply_constraints(kind, count):
    """Return the constraints of the operands of ``multiply_asm``."""
    outputs = [f"={INSTRUCTIONS[kind][1]}"] * count
    return ",".join([*outputs, *map(str, range(count)), *["r"] * (2 * count)])


@gluon.jit
def multiply(
    acc, stage, words,
    KIND: gl.constexpr, STRIPS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, PAIR: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Return ``acc`` plus the product of one slot, whose first stage is ``stage``."""
    COUNT: gl.constexpr = acc.shape[1]
    ASM: gl.constexpr = multiply_asm(KIND, STRIPS, COLUMNS, STAGES, PAIR, WARPGROUP)
    CONSTRAINTS: gl.constexpr = multiply_constraints(KIND, COUNT)
    words = words[:, None, :].broadcast_to([128, COUNT // words.shape[1], words.shape[1]])
    words = gl.reshape(words, [128, COUNT])
    words = gl.convert_layout(words, accumulator_layout(COUNT), assert_trivial=True)
    operands = [acc, stage, words]
    if KIND == "int8":
        acc = gl.inline_asm_elementwise(ASM, CONSTRAINTS, operands, gl.int32, False, COUNT)
    else:
        acc = gl.inline_asm_elementwise(ASM, CONSTRAINTS, operands, gl.float32, False, COUNT)
    return acc
