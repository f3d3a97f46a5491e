"""Multiply 2:4 sparse activations on sm_90: Gluon, TMA, warp specialisation and wgmma.sp.

    acc = expand(values, metadata) @ weightᵀ
    y   = round(acc · row_scale[:, None] · col_scale[None, :] + bias)

Operands are bf16, fp16, fp8 (sums in fp32, as precise as the tensor core makes them) or int8 (sums
in int32). The second line is fp32, in this order and without fused multiply-adds.

    producer, 1 warp          for each tile, for each slot:   wait until empty, load into it
    consumers, 2 warpgroups   for each tile, for each slot:   wait until full, multiply, mark empty
                              then scale, round and store

There are as many programs as multiprocessors, and each walks over its tiles of y: ``program``,
``program + programs``, … The slots go round without regard to tiles, so the producer loads the next
tile's operands while the consumers store the last one's results. Metadata go from global memory to
registers, two slots ahead: ptxas must not see them written while an instruction that reads them is
in flight, so each slot is waited for, and the two warpgroups fill each other's gaps.

Tails: what TMA loads from outside of an operand is zero; what a thread loads from outside of the
metadata is ``EMPTY``, since zero is no legal metadata. So K may end anywhere in a slot and T in a
tile. Nothing is stored outside of y.

Only compiled and emulated so far (tests/kernels/cuda): nothing has run on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from amber_compile.kernels.cuda.device import KINDS
from amber_compile.kernels.cuda.gluon import copy_tile, tile_place
from amber_compile.kernels.cuda.tiles import choose
from amber_compile.kernels.cuda.wgmma_sp_instruction import (
    VALUES_LAYOUT,
    VALUES_WORDS,
    WEIGHT_LAYOUT,
    WEIGHT_WORDS,
    Tile,
    accumulator_layout,
    multiply,
    words_layout,
    words_per_stage,
)
from amber_compile.kernels.cuda.wgmma_sp_offsets import check_offsets
from amber_compile.kernels.cuda.wgmma_sp_store import store
from amber_compile.kernels.two_four import EMPTY

RESULTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
LARGEST_INT8_K = 1 << 18  # K / 2 products of at most 127 · 128 each fit in an int32
EMPTY_WORDS = gl.constexpr(EMPTY)

# ---- kernel --------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["tokens", "octets", "blocks"])
def wgmma_sp_kernel(
    values_tiles, weight_tiles,  # TMA descriptors of words [tokens, K / 2], [outputs, K]
    metadata_ptr,  # [ceil(tokens / 16), blocks, 32]
    y_ptr,  # [tokens, outputs]
    bias_ptr, row_scale_ptr, col_scale_ptr,  # [outputs], [tokens], [outputs], each or None
    tokens, octets, blocks,  # outputs = 8 · octets, K = 64 · blocks
    KIND: gl.constexpr,  # bf16, fp16, int8 or fp8
    RESULT: gl.constexpr,  # the type of y
    STRIPS: gl.constexpr, COLUMNS: gl.constexpr,  # a tile of y: 128 · STRIPS x COLUMNS
    STAGES: gl.constexpr, PAIR: gl.constexpr,  # stages in all, stages in a slot
    GROUP: gl.constexpr,  # rows of tiles that are walked together
):  # fmt: skip
    SLOTS: gl.constexpr = STAGES // PAIR
    weight = gl.allocate_shared_memory(gl.int32, [STAGES, COLUMNS, 32], weight_tiles.layout)
    values = gl.allocate_shared_memory(gl.int32, [STAGES, STRIPS * 128, 16], values_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    results = (y_ptr, bias_ptr, row_scale_ptr, col_scale_ptr)
    sizes = (tokens, octets, blocks)
    gl.warp_specialize(
        [
            (_consume, (
                metadata_ptr, results, full, empty, sizes, 0,
                KIND, RESULT, STRIPS, COLUMNS, STAGES, PAIR, GROUP,
            )),
            (_consume, (
                metadata_ptr, results, full, empty, sizes, 1,
                KIND, RESULT, STRIPS, COLUMNS, STAGES, PAIR, GROUP,
            )),
            (_produce, (
                values_tiles, weight_tiles, values, weight, full, empty, sizes,
                KIND, STRIPS, COLUMNS, STAGES, PAIR, GROUP,
            )),
        ],
        [4, 1],
        [232, 40],  # registers a thread of the second warpgroup and of the producer
    )  # fmt: skip
    weight._keep_alive()
    values._keep_alive()


@gluon.jit
def _produce(
    values_tiles, weight_tiles,  # TMA descriptors
    values, weight, full, empty,  # shared memory
    sizes, KIND: gl.constexpr, STRIPS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, PAIR: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Load the operands of one slot after the other, across tiles."""
    tokens, octets, blocks = sizes
    SLOTS: gl.constexpr = STAGES // PAIR
    BYTES: gl.constexpr = PAIR * 4 * (STRIPS * 128 * 16 + COLUMNS * 32)
    rows, columns = gl.cdiv(tokens, STRIPS * 128), gl.cdiv(octets * 8, COLUMNS)
    steps = gl.cdiv(blocks, PAIR * words_per_stage(KIND))
    count = 0  # slots so far
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        row, column = tile_place(tile, rows, columns, GROUP)
        for step in range(steps):
            slot = count % SLOTS
            mbarrier.wait(empty.index(slot), ((count // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            for i in gl.static_range(PAIR):
                stage = step * PAIR + i
                copy_tile(
                    values_tiles, [row * STRIPS * 128, stage * 16],
                    full.index(slot), values.index(slot * PAIR + i),
                )  # fmt: skip
                copy_tile(
                    weight_tiles, [column * COLUMNS, stage * 32],
                    full.index(slot), weight.index(slot * PAIR + i),
                )  # fmt: skip
            count += 1


@gluon.jit
def _consume(
    metadata_ptr, results,  # metadata; y, bias, row_scale, col_scale
    full, empty, sizes, WARPGROUP: gl.constexpr, KIND: gl.constexpr, RESULT: gl.constexpr,
    STRIPS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, PAIR: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Multiply the strips of one warpgroup in each tile, slot by slot, and store them."""
    tokens, octets, blocks = sizes
    SLOTS: gl.constexpr = STAGES // PAIR
    WORDS: gl.constexpr = PAIR * words_per_stage(KIND)
    COUNT: gl.constexpr = STRIPS * COLUMNS // 2  # accumulators
    ACC: gl.constexpr = accumulator_layout(COUNT)
    rows, columns = gl.cdiv(tokens, STRIPS * 128), gl.cdiv(octets * 8, COLUMNS)
    steps = gl.cdiv(blocks, WORDS)
    last = rows * columns - 1
    count = 0  # slots so far
    row, column = tile_place(gl.program_id(0), rows, columns, GROUP)
    first = (row * 2 + WARPGROUP) * STRIPS * 64
    words = _metadata(metadata_ptr, first, 0, tokens, blocks, COUNT, STRIPS, WORDS)
    following = _metadata(metadata_ptr, first, WORDS, tokens, blocks, COUNT, STRIPS, WORDS)
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        acc = gl.zeros([128, COUNT], gl.int32 if KIND == "int8" else gl.float32, ACC)
        for step in range(steps):
            block = (step + 2) * WORDS
            later = _metadata(metadata_ptr, first, block, tokens, blocks, COUNT, STRIPS, WORDS)
            slot = count % SLOTS
            mbarrier.wait(full.index(slot), (count // SLOTS) & 1)
            acc = multiply(acc, slot * PAIR, words, KIND, STRIPS, COLUMNS, STAGES, PAIR, WARPGROUP)
            mbarrier.arrive(empty.index(slot))
            words, following = following, later
            count += 1
        stored_row, stored_column = first, column * COLUMNS
        # ask for the next tile's metadata before storing this one
        row, column = tile_place(gl.minimum(tile + gl.num_programs(0), last), rows, columns, GROUP)
        first = (row * 2 + WARPGROUP) * STRIPS * 64
        words = _metadata(metadata_ptr, first, 0, tokens, blocks, COUNT, STRIPS, WORDS)
        following = _metadata(metadata_ptr, first, WORDS, tokens, blocks, COUNT, STRIPS, WORDS)
        store(acc, results, stored_row, stored_column, tokens, octets * 8, RESULT, STRIPS, COLUMNS)


@gluon.jit
def _metadata(
    metadata_ptr, row, block, tokens, blocks,
    COUNT: gl.constexpr, STRIPS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Return words [128 threads, STRIPS · WORDS]: of each strip from ``row``, each block of
    channels from ``block``."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, words_layout(COUNT, STRIPS * WORDS))
    thread = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))[:, None]
    word = gl.arange(0, STRIPS * WORDS, gl.SliceLayout(0, LAYOUT))[None, :]
    tile = row // 16 + word // WORDS * 4 + thread // 32
    at = block + word % WORDS
    ptrs = metadata_ptr + (tile.to(gl.int64) * blocks + at) * 32 + thread % 32
    return gl.load(ptrs, mask=(tile * 16 < tokens) & (at < blocks), other=EMPTY_WORDS)


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
    if values.dtype not in KINDS:
        return f"wgmma.sp has no kernel for {values.dtype}; valid: {', '.join(map(str, KINDS))}"
    if weight.shape[1] == 0:
        return "there are no channels to sum over"
    if values.dtype == torch.int8 and weight.shape[1] > LARGEST_INT8_K:
        return (
            f"int32 sums may overflow with {weight.shape[1]} channels; valid: up to "
            f"{LARGEST_INT8_K}"
        )
    for name, tensor in (("values", values), ("metadata", metadata), ("weight", weight)):
        if tensor.is_contiguous() and tensor.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes, as TMA needs it"
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
    """Compute amber::nm_matmul for operands that ``why_not`` has nothing against.

    Raises:
        WrongOffsets: if the compiler laid out shared memory otherwise than the kernel relies on.
    """
    (tokens, _), (outputs, channels) = values.shape, weight.shape
    kind = KINDS[values.dtype]
    dtype = out_dtype or (torch.bfloat16 if values.dtype.itemsize == 1 else values.dtype)
    y = torch.empty(tokens, outputs, dtype=dtype, device=values.device)
    if not y.numel():
        return y
    processors = multiprocessors(values.device)
    tile = choose(kind, tokens, outputs, channels, processors)
    tiles = -(-tokens // tile.rows) * -(-outputs // tile.columns)
    compiled = wgmma_sp_kernel[(min(tiles, processors),)](
        tiles_of(values, [tile.rows, VALUES_WORDS], VALUES_LAYOUT),
        tiles_of(weight, [tile.columns, WEIGHT_WORDS], WEIGHT_LAYOUT),
        *(metadata.contiguous(), y),
        *(None if each is None else each.contiguous() for each in (bias, row_scale, col_scale)),
        *(tokens, outputs // 8, channels // 64),
        **constants(tile, kind, dtype),
        **OPTIONS,
    )
    check_offsets(compiled, tile)
    return y


def tiles_of(
    operand: torch.Tensor, block: list[int], layout: gl.NVMMASharedLayout
) -> TensorDescriptor:
    """Return a TMA descriptor of an operand's 32-bit words."""
    words = operand.contiguous().view(torch.int32)
    return TensorDescriptor.from_tensor(words, block, layout)


def constants(tile: Tile, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constexpr arguments of the kernel."""
    return {
        "KIND": kind,
        "RESULT": RESULTS[dtype],
        "STRIPS": tile.strips,
        "COLUMNS": tile.columns,
        "STAGES": tile.stages,
        "PAIR": tile.pair,
        "GROUP": tile.group,
    }


# the warps of the first partition; products and sums rounded one by one
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
