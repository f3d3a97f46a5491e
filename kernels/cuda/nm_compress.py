"""Select two of every four channels and compress them: Triton kernels, for any GPU since sm_80.

A group of four 16-bit channels is one integer of 64 bits (packed_groups.py), so that a load is a
row of groups, what is kept of each is one integer of 32 bits, and no value ever leaves its thread:
four groups of a thread make 32 bytes loaded, 16 stored, and 16 bits of metadata.

    kernel                  one program holds
    _compress               a tile of 16 rows, BLOCK groups; with a correction two rows g and g + 8
                            of a tile, which it walks from end to end to sum their energies
    _compress_quantized     two rows g and g + 8, or one if they are long, from end to end: what is
                            kept stays in registers until the largest is known, so x is read once

Rows that x does not have are loaded as zeros, which gives ``EMPTY`` unless a factor is not finite;
so it is set. Nothing may be contracted to a fused multiply-add, for codes and scales are rounded
like the reference's; only the energies are summed in another order.

The block sizes were chosen by what they compile to for sm_80 and sm_90 (16-byte loads, no spills,
at most 128 registers, so that a multiprocessor has 48 KiB of x or more in flight). They were not
tuned on a GPU.
"""

# ruff: noqa: RET505, RUF005 - Triton compiles what follows a return, and cannot unpack in a tuple

from __future__ import annotations

import torch
import triton
import triton.language as tl

from amber_compile.kernels.codes import CODES
from amber_compile.kernels.cuda.codes import code_of, converts, magnitude_bits, scale_of
from amber_compile.kernels.cuda.packed_groups import (
    add_energies,
    float_of,
    load_factors,
    nibbles_of,
    norm_correction,
    pair_of,
    select_two,
    smoothed,
)
from amber_compile.kernels.nm_compress import Compressed
from amber_compile.kernels.two_four import EMPTY, TILE_COLUMNS, tile_count

EMPTY_WORD = tl.constexpr(EMPTY)

# ---- 16 bit --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _compress(
    x_ptr, factor_ptr,                  # [tokens, GROUPS] of int64, [4 GROUPS] or None
    values_ptr, metadata_ptr,           # [tokens, GROUPS] of int32, [tiles, GROUPS / 16, 32]
    row_scale_ptr,                      # [tokens], or None without a correction
    tokens, x_stride,                   # row stride in groups
    GROUPS: tl.constexpr, FLOAT16: tl.constexpr,
    PAIRS: tl.constexpr,                # pairs of rows g and g + 8 a program
    BLOCK: tl.constexpr,                # groups a step
    STEPS: tl.constexpr,
):  # fmt: skip
    tile = (tl.program_id(0) * PAIRS // 8).to(tl.int64)
    g = tl.program_id(0) * PAIRS % 8 + tl.arange(0, PAIRS)
    rows = tile * 16 + g
    upper = (tl.full((PAIRS, BLOCK), 0, tl.float32), tl.full((PAIRS, BLOCK), 0, tl.float32))
    lower = upper
    for step in tl.range(0, STEPS):
        start = (tl.program_id(1) * STEPS + step) * BLOCK
        factors = load_factors(factor_ptr, start, GROUPS, BLOCK)
        runs_upper, upper = _compress_rows(
            x_ptr, values_ptr, rows, start, tokens, x_stride, factors, upper,
            factor_ptr is not None, row_scale_ptr is not None, GROUPS, FLOAT16, BLOCK,
        )  # fmt: skip
        runs_lower, lower = _compress_rows(
            x_ptr, values_ptr, rows + 8, start, tokens, x_stride, factors, lower,
            factor_ptr is not None, row_scale_ptr is not None, GROUPS, FLOAT16, BLOCK,
        )  # fmt: skip
        runs = start // 4 + tl.arange(0, BLOCK // 4)[None, :]
        at = (tile * (GROUPS // 16) + runs // 4) * 32 + 4 * g[:, None] + runs % 4
        tl.store(metadata_ptr + at, runs_upper | (runs_lower << 16), mask=runs < GROUPS // 4)
    if row_scale_ptr is not None:
        scale_upper, scale_lower = norm_correction(upper, GROUPS), norm_correction(lower, GROUPS)
        tl.store(row_scale_ptr + rows, scale_upper, mask=rows < tokens)
        tl.store(row_scale_ptr + rows + 8, scale_lower, mask=rows + 8 < tokens)


@triton.jit
def _compress_rows(
    x_ptr, values_ptr, rows, start, tokens, x_stride, factors, energies,
    FACTOR: tl.constexpr, CORRECT: tl.constexpr,
    GROUPS: tl.constexpr, FLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store what is kept; return the runs of four nibbles, and the energies with these added."""
    rows = rows[:, None]
    groups = start + tl.arange(0, BLOCK)[None, :]
    live = (rows < tokens) & (groups < GROUPS)
    words = tl.load(x_ptr + rows * x_stride + groups, mask=live, other=0)
    first, second = select_two(words, factors, FACTOR, FLOAT16)
    tl.store(values_ptr + rows * GROUPS + groups, pair_of(first, second), mask=live)
    if CORRECT:
        energies = add_energies(energies, words, first, second, FLOAT16)
    return tl.where(rows < tokens, nibbles_of(first, second, 4), EMPTY_WORD & 0xFFFF), energies


# ---- 8 bit ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _compress_quantized(
    x_ptr, factor_ptr, smooth_ptr,      # [tokens, GROUPS] of int64, [4 GROUPS] or None, the same
    values_ptr, metadata_ptr,           # [tokens, GROUPS] of int16, [tiles, GROUPS / 16, 32]
    row_scale_ptr,                      # [tokens]
    tokens, x_stride,                   # row stride in groups
    GROUPS: tl.constexpr, FLOAT16: tl.constexpr,
    CORRECT: tl.constexpr,
    FP8: tl.constexpr,                  # or int8
    CONVERT: tl.constexpr,              # to fp8 by the hardware
    ROWS: tl.constexpr,                 # a program: 2 (g and g + 8) or 1
    BLOCK: tl.constexpr,                # groups a step
    STEPS: tl.constexpr,
):  # fmt: skip
    tile, g = (tl.program_id(0) * ROWS // 16).to(tl.int64), tl.program_id(0) % 8
    halves = tl.program_id(0) // 8 * ROWS % 2 + tl.arange(0, ROWS)[:, None]
    rows = tile * 16 + g + 8 * halves
    energies = (tl.full((ROWS, BLOCK), 0, tl.float32), tl.full((ROWS, BLOCK), 0, tl.float32))
    largest = tl.full((ROWS, BLOCK), 0, tl.int32)
    kept = ()
    for step in tl.static_range(0, STEPS):
        groups = step * BLOCK + tl.arange(0, BLOCK)[None, :]
        live = (rows < tokens) & (groups < GROUPS)
        words = tl.load(x_ptr + rows * x_stride + groups, mask=live, other=0)
        factors = load_factors(factor_ptr, step * BLOCK, GROUPS, BLOCK)
        first, second = select_two(words, factors, factor_ptr is not None, FLOAT16)
        smooths = load_factors(smooth_ptr, step * BLOCK, GROUPS, BLOCK)
        one, larger = _remembered(first, second, smooths, smooth_ptr is not None, FLOAT16)
        kept = kept + (one,)
        largest = tl.maximum(largest, larger)
        if CORRECT:
            energies = add_energies(energies, words, first, second, FLOAT16)
        runs = step * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        at = (tile * (GROUPS // 16) + runs // 2) * 32 + 4 * g + 2 * (runs % 2) + halves
        nibbles = tl.where(rows < tokens, nibbles_of(first, second, 8), EMPTY_WORD)
        tl.store(metadata_ptr + at, nibbles, mask=runs < GROUPS // 8)
    largest = tl.max(largest, axis=1)[:, None]
    if smooth_ptr is None:
        finite = largest < (0x7C00 if FLOAT16 else 0x7F80)
        amax = float_of(tl.where(finite, largest, 0), FLOAT16)
    else:
        finite = largest < 0x7F800000
        amax = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
    scale, inverse = scale_of(amax, FP8)
    for step in tl.static_range(0, STEPS):
        groups = step * BLOCK + tl.arange(0, BLOCK)[None, :]
        first, second = _recalled(kept[step], finite, smooth_ptr is not None, FLOAT16)
        first = code_of(first * inverse, FP8, CONVERT)
        second = code_of(second * inverse, FP8, CONVERT)
        codes = ((first & 0xFF) | (second << 8)).to(tl.int16)
        live = (rows < tokens) & (groups < GROUPS)
        tl.store(values_ptr + rows * GROUPS + groups, codes, mask=live)
    scale = tl.where(finite, scale, float("nan"))
    if CORRECT:
        scale = scale * norm_correction(energies, GROUPS)[:, None]
    tl.store(row_scale_ptr + rows, scale, mask=rows < tokens)


@triton.jit
def _remembered(first, second, smooths, SMOOTH: tl.constexpr, FLOAT16: tl.constexpr):
    """Return what is kept of each group until the scale is known, and its larger magnitude."""
    if SMOOTH:
        one, other = smoothed(first, second, smooths, FLOAT16)
        return (one, other), tl.maximum(magnitude_bits(one), magnitude_bits(other))
    else:
        return pair_of(first, second), tl.maximum(first & 0x7FFF, second & 0x7FFF)


@triton.jit
def _recalled(kept, finite, SMOOTH: tl.constexpr, FLOAT16: tl.constexpr):
    """Return the two values of each group in fp32, zeros in a row that is not finite."""
    if SMOOTH:
        return tl.where(finite, kept[0], 0.0), tl.where(finite, kept[1], 0.0)
    else:
        pair = tl.where(finite, kept, 0)
        return float_of(pair & 0xFFFF, FLOAT16), float_of((pair >> 16) & 0xFFFF, FLOAT16)


# ---- launch --------------------------------------------------------------------------------------

# (rows, warps) of _compress_quantized: the first that leaves a thread 16 words to remember, one a
# group, or two a smoothed group. Beyond the last (K = 32768, or half of that) a thread has more: up
# to 28 words were compiled and are not spilled.
SHAPES = ((2, 4), (2, 8), (1, 8), (1, 16))
GROUPS_A_WARP = 128  # a step: four a thread


def launch(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None,
    correction: str | None,
    smooth: torch.Tensor | None = None,
) -> Compressed:
    """Compress ``x`` [tokens, channels], whose channels are contiguous, on the current stream."""
    tokens, channels = x.shape
    dtype = CODES[quantize] if quantize else x.dtype
    scaled = tokens if quantize or correction else 0
    values = x.new_empty(tokens, channels // 2, dtype=dtype)
    metadata = x.new_empty(tile_count(tokens), channels // TILE_COLUMNS, 32, dtype=torch.int32)
    row_scale = x.new_empty(scaled, dtype=torch.float32)
    if tokens:
        words = _words(x)
        integers = values.view(torch.int16 if quantize else torch.int32)
        results = (integers, metadata, row_scale if scaled else None)
        sizes = {"tokens": tokens, "x_stride": words.stride(0), "GROUPS": channels // 4}
        sizes["FLOAT16"] = x.dtype == torch.float16
        if quantize:
            codes = {"FP8": quantize == "fp8", "CONVERT": converts(x.device)}
            codes["CORRECT"] = correction is not None
            _launch_quantized((words, factor, smooth, *results), sizes, codes)
        else:
            _launch((words, factor, *results), sizes, correction is not None)
    return values, metadata, row_scale


def _words(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as integers of 64 bits; a row that does not begin at one is copied first."""
    if x.stride(0) % 4 or x.storage_offset() % 4 or x.data_ptr() % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int64)


def _launch(tensors: tuple[torch.Tensor | None, ...], sizes: dict[str, int], correct: bool) -> None:
    pairs = 1 if correct else 8  # a whole tile, unless its rows are walked
    tiles, groups = triton.cdiv(sizes["tokens"], 16), sizes["GROUPS"]
    block = min(512 if correct else 128, triton.next_power_of_2(groups))
    steps = triton.cdiv(groups, block)
    grid = (tiles * 8, 1) if correct else (tiles, steps)
    shape = {"PAIRS": pairs, "BLOCK": block, "STEPS": steps if correct else 1}
    _compress[grid](*tensors, **sizes, **shape, num_warps=4, enable_fp_fusion=False)


def _launch_quantized(
    tensors: tuple[torch.Tensor | None, ...], sizes: dict[str, int], codes: dict[str, bool]
) -> None:
    groups, remembered = sizes["GROUPS"], 1 if tensors[2] is None else 2
    words = remembered * groups
    fits = (shape for shape in SHAPES if shape[0] * words <= 16 * 32 * shape[1])
    rows, warps = next(fits, SHAPES[-1])
    block = min(GROUPS_A_WARP * warps, triton.next_power_of_2(groups))
    shape = {"ROWS": rows, "BLOCK": block, "STEPS": triton.cdiv(groups, block)}
    grid = (triton.cdiv(sizes["tokens"], 16) * 16 // rows,)
    _compress_quantized[grid](
        *tensors, **sizes, **codes, **shape, num_warps=warps, enable_fp_fusion=False
    )
