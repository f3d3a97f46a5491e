"""Multiply 2:4 sparse activations on sm_80, sm_86, sm_89 and sm_120: Gluon, cp.async and mma.sp.

    acc = expand(values, metadata) @ weightᵀ
    y   = round(acc · row_scale[:, None] · col_scale[None, :] + bias)

Operands are bf16, fp16 (sums in fp32) or int8 (sums in int32). The second line is fp32, in this
order and without fused multiply-adds, so int8 answers bit for bit like the reference. An int32 sum
of K / 2 products of at most 2^14 cannot overflow below K = 2^18; a larger K is declined, and the
saturating form of the instruction has no use.

Operands are moved as 32-bit words: a word is 2 elements of 16 bit or 4 of 8 bit, and in words all
kinds look alike. One instruction multiplies 16 rows x 8 words of values with 8 rows x 16 words of
weight. A stage of the pipeline holds WORDS words of each row of values, twice as many of the
weight, and their metadata. All of them come by cp.async, 16 bytes a thread:

    wait for stage k;  barrier;  ask for stage k + STAGES - 1, in the place of k - 1;  multiply k

Tails: beyond ``tokens`` and ``outputs`` the last row is read again, and nothing is stored. Beyond K
values and weights are zero. Metadata beyond the last row of tiles or the last block are those of
the last, because zero is no legal metadata and would make the whole answer undefined.

Only compiled and emulated so far (tests/kernels/cuda): nothing has been timed on a GPU, and the
choice of a tile is an estimate.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from amber_compile.kernels.cuda.gluon import (
    block_barrier,
    copy_async,
    store_scaled,
    tile_place,
)
from amber_compile.kernels.cuda.mma_sp_layout import (
    KINDS,
    Configuration,
    accumulator_layout,
    choose,
    constraints,
    copy_layout,
    instruction,
    matrix_layout,
    programs,
    shared_layout,
    steps,
    values_layout,
    weight_layout,
)

RESULTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
GROUP = 8  # rows of tiles that are walked together
LARGEST_INT8_K = 1 << 18

# ---- kernel --------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["tokens", "octets", "blocks"])
def mma_sp_kernel(
    values_ptr, weight_ptr,  # words [tokens, K / 2], [outputs, K]
    metadata_ptr,  # [ceil(tokens / 16), blocks, 32]
    y_ptr,  # [tokens, outputs]
    bias_ptr, row_scale_ptr, col_scale_ptr,  # [outputs], [tokens], [outputs], each or None
    tokens, octets, blocks,  # outputs = 8 · octets, K = 64 · blocks
    KIND: gl.constexpr,  # bf16, fp16 or int8
    RESULT: gl.constexpr,  # the type of y
    ROWS: gl.constexpr, COLUMNS: gl.constexpr,  # of y, a program
    WARPS_M: gl.constexpr, WARPS_N: gl.constexpr,  # along the rows, along the columns
    STAGES: gl.constexpr, WORDS: gl.constexpr,  # words of a row of values in a stage
    GROUP: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = WORDS // (8 * steps(KIND))  # a stage
    ACC: gl.constexpr = accumulator_layout(ROWS, COLUMNS, WARPS_M, WARPS_N)
    outputs = octets * 8
    tile_m, tile_n = tile_place(
        gl.program_id(0), gl.cdiv(tokens, ROWS), gl.cdiv(outputs, COLUMNS), GROUP
    )
    row, column = tile_m * ROWS, tile_n * COLUMNS
    source = _source(
        values_ptr, weight_ptr, metadata_ptr, row, column, tokens, outputs, blocks,
        KIND, ROWS, COLUMNS, WORDS, WARPS_M * WARPS_N,
    )  # fmt: skip
    METADATA: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])  # a warp reads 128 bytes
    a = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, WORDS], shared_layout(WORDS))
    b = gl.allocate_shared_memory(gl.int32, [STAGES, COLUMNS, 2 * WORDS], shared_layout(2 * WORDS))
    e = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCKS * ROWS // 16, 32], METADATA)
    for stage in gl.static_range(STAGES - 1):
        _ask(a, b, e, source, stage, blocks, STAGES, BLOCKS)

    TILES: gl.constexpr = [ROWS // 16, COLUMNS // 8, 32, 4]
    acc = gl.zeros(TILES, gl.int32 if KIND == "int8" else gl.float32, ACC)
    for stage in range(gl.cdiv(blocks, BLOCKS)):
        async_copy.wait_group(STAGES - 2)
        block_barrier()
        _ask(a, b, e, source, stage + STAGES - 1, blocks, STAGES, BLOCKS)
        place = stage % STAGES
        for at in gl.static_range(WORDS // 8):
            acc = _multiply(
                acc, a.index(place), b.index(place), e.index(place), at,
                KIND, ROWS, COLUMNS, WARPS_M, WARPS_N, ACC,
            )  # fmt: skip
    async_copy.wait_group(0)  # of stages beyond the last: the epilogue reuses their memory
    block_barrier()
    _store(
        acc, y_ptr, bias_ptr, row_scale_ptr, col_scale_ptr, row, column, tokens, outputs,
        RESULT, ROWS, COLUMNS, WARPS_M, WARPS_N,
    )  # fmt: skip


@gluon.jit
def _source(
    values_ptr, weight_ptr, metadata_ptr,
    row, column, tokens, outputs, blocks,
    KIND: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    WORDS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Return pointers to the first stage, and which word of a row or which block each points to."""
    words = blocks * (8 * steps(KIND))
    a_row, a_word = _places(ROWS, WORDS, WARPS, row, tokens)
    b_row, b_word = _places(COLUMNS, 2 * WORDS, WARPS, column, outputs)
    a = values_ptr + a_row.to(gl.int64) * words + a_word
    b = weight_ptr + b_row.to(gl.int64) * (2 * words) + b_word
    # metadata of a stage: all tiles of its first block, then of the next
    LAYOUT: gl.constexpr = copy_layout(32, 4, WARPS)
    at = gl.arange(0, ROWS // 16 * (WORDS // (8 * steps(KIND))), gl.SliceLayout(1, LAYOUT))
    tile = gl.minimum(row // 16 + at % (ROWS // 16), gl.cdiv(tokens, 16) - 1)[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    e = metadata_ptr + tile.to(gl.int64) * (32 * blocks) + lane
    return a, a_word, b, b_word, e, (at // (ROWS // 16))[:, None], words


@gluon.jit
def _places(ROWS: gl.constexpr, WORDS: gl.constexpr, WARPS: gl.constexpr, first, end):
    """Return rows [ROWS, 1] from ``first``, the last one for those past the end, and words."""
    LAYOUT: gl.constexpr = copy_layout(WORDS, 4, WARPS)
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    return (
        gl.minimum(rows, end - 1)[:, None],
        gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))[None, :],
    )


@gluon.jit
def _ask(a, b, e, source, stage, blocks, STAGES: gl.constexpr, BLOCKS: gl.constexpr):
    """Start the copies of a stage, which may lie beyond the last one: then of zeros."""
    a_ptrs, a_word, b_ptrs, b_word, e_ptrs, e_block, words = source
    WORDS: gl.constexpr = a.shape[2]
    place = stage % STAGES
    first = stage * WORDS
    copy_async(a.index(place), a_ptrs + first, mask=first + a_word < words)
    copy_async(b.index(place), b_ptrs + 2 * first, mask=2 * first + b_word < 2 * words)
    copy_async(e.index(place), e_ptrs + gl.minimum(stage * BLOCKS + e_block, blocks - 1) * 32)
    async_copy.commit_group()


@gluon.jit
def _multiply(
    acc, a, b, e,  # a stage: [ROWS, WORDS], [COLUMNS, 2 · WORDS], [blocks · ROWS / 16, 32]
    AT: gl.constexpr,  # which instruction of the stage
    KIND: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Return ``acc`` plus what one instruction a warp and accumulator tile multiplies."""
    x = a.slice(8 * AT, 8, 1).load(values_layout(ROWS, WARPS_M, WARPS_N))
    x = gl.reshape(x, [ROWS // 16, 2, 8, 2, 4])  # tile, register & 1, g, register >> 1, t
    x = gl.reshape(gl.permute(x, [0, 2, 4, 3, 1]), [ROWS // 16, 32, 4])
    x = gl.convert_layout(x, gl.SliceLayout(1, ACC), assert_trivial=True)
    w = b.slice(16 * AT, 16, 1).load(weight_layout(COLUMNS, WARPS_M, WARPS_N))
    w = gl.reshape(w, [COLUMNS // 8, 8, 4, 4])  # tile, g, register, t
    w = gl.reshape(gl.permute(w, [0, 1, 3, 2]), [COLUMNS // 8, 32, 4])
    w = gl.convert_layout(w, gl.SliceLayout(0, ACC), assert_trivial=True)
    metadata = e.slice(AT // steps(KIND) * (ROWS // 16), ROWS // 16, 0)
    metadata = metadata.load(gl.SliceLayout(1, gl.SliceLayout(3, ACC)))
    metadata = gl.expand_dims(gl.expand_dims(metadata, 1), 3)
    ASM: gl.constexpr = instruction(KIND, AT % steps(KIND))
    MARKS: gl.constexpr = constraints(KIND)
    operands = [gl.expand_dims(x, 1), gl.expand_dims(w, 0), acc, metadata]
    if KIND == "int8":
        acc = gl.inline_asm_elementwise(ASM, MARKS, operands, gl.int32, True, 4)
    else:
        acc = gl.inline_asm_elementwise(ASM, MARKS, operands, gl.float32, True, 4)
    return acc


@gluon.jit
def _store(
    acc, y_ptr, bias_ptr, row_scale_ptr, col_scale_ptr,
    row, column, tokens, outputs,
    RESULT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    WARPS_M: gl.constexpr, WARPS_N: gl.constexpr,
):  # fmt: skip
    """Scale, add the bias, round, and store 16 bytes a thread."""
    MATRIX: gl.constexpr = matrix_layout(ROWS, COLUMNS, WARPS_M, WARPS_N)
    y = gl.reshape(acc, [ROWS // 16, COLUMNS // 8, 8, 4, 2, 2])  # tiles, g, t, i >> 1, i & 1
    y = gl.reshape(gl.permute(y, [0, 4, 2, 1, 3, 5]), [ROWS, COLUMNS])
    WIDE: gl.constexpr = copy_layout(COLUMNS, 128 // RESULT.primitive_bitwidth, WARPS_M * WARPS_N)
    store_scaled(
        y, y_ptr, bias_ptr, row_scale_ptr, col_scale_ptr, row, column, tokens, outputs,
        RESULT, MATRIX, WIDE,
    )  # fmt: skip


# ---- launch --------------------------------------------------------------------------------------


def why_not(
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Return why this kernel cannot compute a product that amber::nm_matmul accepts, or None."""
    if values.dtype == torch.float8_e4m3fn:
        return "mma.sp has no kernel for fp8: sm_90 emulates it, and it is offered nowhere else"
    if values.dtype not in KINDS:
        return f"mma.sp has no kernel for {values.dtype}; valid: {', '.join(map(str, KINDS))}"
    channels = weight.shape[1]
    if channels == 0:
        return "there are no channels to sum over"
    if values.dtype == torch.int8 and channels > LARGEST_INT8_K:
        return f"int32 sums may overflow with {channels} channels; valid: up to {LARGEST_INT8_K}"
    for name, tensor in (("values", values), ("metadata", metadata), ("weight", weight)):
        if tensor.is_contiguous() and tensor.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes"
    return None


def launch(
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute amber::nm_matmul for operands that ``why_not`` has nothing against."""
    (tokens, _), (outputs, channels) = values.shape, weight.shape
    kind = KINDS[values.dtype]
    dtype = out_dtype or (torch.bfloat16 if kind == "int8" else values.dtype)
    y = torch.empty(tokens, outputs, dtype=dtype, device=values.device)
    if not y.numel():
        return y
    tile = choose(kind, tokens, outputs, shared_memory(values.device))
    with torch.cuda.device_of(values):
        mma_sp_kernel[(programs(tile, tokens, outputs),)](
            *(values.contiguous().view(torch.int32), weight.contiguous().view(torch.int32)),
            *(metadata.contiguous(), y),
            *(None if each is None else each.contiguous() for each in (bias, row_scale, col_scale)),
            *(tokens, outputs // 8, channels // 64),
            **constants(tile, kind, dtype),
            **options(tile),
        )
    return y


def constants(tile: Configuration, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constexpr arguments of the kernel."""
    return {
        "KIND": kind,
        "RESULT": RESULTS[dtype],
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "STAGES": tile.stages,
        "WORDS": tile.words,
        "GROUP": GROUP,
    }


def options(tile: Configuration) -> dict[str, Any]:
    """Return the compiler's options: warps, and products and sums rounded one by one."""
    return {"num_warps": tile.warps, "enable_fp_fusion": False}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have on a device."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # not in its stub
