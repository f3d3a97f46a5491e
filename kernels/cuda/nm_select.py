"""The N:M selection of nm_select.py on a GPU, for every pattern: dense in, dense out.

Without a correction a program has a block of channels of some tokens, and a thread 32 channels, in
whole groups (channel_groups.py). A correction takes a program for each token, in two passes
(variance: three): each selects again rather than keep the token in registers.

Nothing here waits for the device: the experts' ends are read by the kernels.
"""

# ruff: noqa: RUF005 - Triton cannot unpack in a tuple

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from amber_compile.kernels.cuda.channel_groups import (
    kept_channels,
    load_channels,
    store_channels,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

EPSILON = tl.constexpr(1e-30)

# ---- experts -------------------------------------------------------------------------------------


@triton.jit
def _per_row(values, SPANS: tl.constexpr):
    """Return values [rows] for every span [rows * spans, 1]."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], (ROWS, SPANS)), (ROWS * SPANS, 1))


@triton.jit
def expert_of(ends_ptr, row, experts, EXPERT_BITS: tl.constexpr):
    """Return how many experts end at or before each row, the last one aside: a binary search."""
    expert = (row * 0).to(tl.int32)
    for i in tl.static_range(EXPERT_BITS):
        probe = expert + (1 << (EXPERT_BITS - 1 - i))
        end = tl.load(ends_ptr + probe - 1, probe < experts, 0)
        expert = tl.where((probe < experts) & (end <= row), probe, expert)
    return expert


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "sequence", "dense", "experts"])
def nm_select_kernel(
    x_ptr, factor_ptr, ends_ptr, y_ptr,       # [tokens, channels], [experts, channels], [experts]
    tokens, channels, x_stride,               # y is like x, but contiguous
    sequence, dense,                          # of every sequence so many tokens are copied, or None
    experts,                                  # None: one factor, [channels]
    N: tl.constexpr, M: tl.constexpr,
    SPAN: tl.constexpr, PIECE: tl.constexpr,  # channels of a thread, and of a load
    SPANS: tl.constexpr, ROWS: tl.constexpr,  # per program
    EXPERT_BITS: tl.constexpr,                # binary digits of an expert's number
):  # fmt: skip
    """Select without a correction."""
    blocks = (channels + SPANS * SPAN - 1) // (SPANS * SPAN)
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    first_column = tl.program_id(0) % blocks * (SPANS * SPAN)
    item = tl.arange(0, ROWS * SPANS)
    row = first_row + item // SPANS
    column = first_column + item % SPANS * SPAN
    live = (row < tokens)[:, None]
    x = load_channels(x_ptr + row[:, None] * x_stride, column, channels, live, SPAN, PIECE)
    factor = None
    if ends_ptr is not None:
        expert = expert_of(ends_ptr, first_row + tl.arange(0, ROWS), experts, EXPERT_BITS)
        factor_row = factor_ptr + _per_row(expert, SPANS).to(tl.int64) * channels
        factor = load_channels(factor_row, column, channels, live, SPAN, 4)
    elif factor_ptr is not None:
        column_of_row = first_column + tl.arange(0, SPANS) * SPAN
        factor = load_channels(factor_ptr, column_of_row, channels, True, SPAN, 4)
    copied = None
    if dense is not None:
        copied = row % sequence < dense
    y = kept_channels(x, factor, copied, N, M)
    store_channels(y_ptr + row[:, None] * channels, column, channels, live, y, PIECE)


@triton.jit
def selected_block(
    x_ptr, factor_ptr,                        # of the token's row; the latter may be None
    copied, block, channels,                  # whether all channels are kept, or None
    N: tl.constexpr, M: tl.constexpr,
    SPAN: tl.constexpr, PIECE: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Return where the spans of a block begin, their channels, and what is kept of them."""
    column = (block * SPANS + tl.arange(0, SPANS)) * SPAN
    x = load_channels(x_ptr, column, channels, True, SPAN, PIECE)
    factor = None
    if factor_ptr is not None:
        factor = load_channels(factor_ptr, column, channels, True, SPAN, 4)
    return column, x, kept_channels(x, factor, copied, N, M)


@triton.jit
def add_energy(total, values, mean, column, channels):
    """Add values, or their squared distances from ``mean``, to a sum per span."""
    for i in tl.static_range(len(values)):
        value = values[i].to(tl.float32)
        if mean is not None:
            value = tl.where(column + i < channels, value - mean, 0.0)
            value = value * value
        total += value
    return total


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def _means(
    x_ptr, factor_ptr, x_mean, kept_mean, channels,
    N: tl.constexpr, M: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr,
    SPANS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the means of a token and of what is kept of it, or of the squares about means."""
    before = tl.full((SPANS,), 0.0, tl.float32)
    after = tl.full((SPANS,), 0.0, tl.float32)
    for block in range(BLOCKS):
        column, x, kept = selected_block(
            x_ptr, factor_ptr, None, block, channels, N, M, SPAN, PIECE, SPANS
        )
        before = add_energy(before, x, x_mean, column, channels)
        after = add_energy(after, kept, kept_mean, column, channels)
    count = channels.to(tl.float32)
    before, after = tl.reduce(before, 0, plus), tl.reduce(after, 0, plus)
    return tl.div_rn(before, count), tl.div_rn(after, count)


@triton.jit(do_not_specialize=["sequence", "dense", "experts"])
def nm_select_corrected_kernel(
    x_ptr, factor_ptr, ends_ptr, y_ptr,       # [tokens, channels], [experts, channels], [experts]
    channels, x_stride,                       # y is like x, but contiguous
    sequence, dense,                          # of every sequence so many tokens are copied, or None
    experts,                                  # None: one factor, [channels]
    N: tl.constexpr, M: tl.constexpr,
    SPAN: tl.constexpr, PIECE: tl.constexpr,  # channels of a thread, and of a load
    SPANS: tl.constexpr, BLOCKS: tl.constexpr,  # per block of a token; per token
    EXPERT_BITS: tl.constexpr,                # binary digits of an expert's number
    VARIANCE: tl.constexpr,                   # energies about the means
):  # fmt: skip
    """Select, and scale what is kept of each token; a program has one."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * channels
    if ends_ptr is not None:
        factor_ptr += expert_of(ends_ptr, row, experts, EXPERT_BITS).to(tl.int64) * channels
    x_mean = 0.0
    kept_mean = 0.0
    if VARIANCE:
        x_mean, kept_mean = _means(
            x_ptr, factor_ptr, None, None, channels, N, M, SPAN, PIECE, SPANS, BLOCKS
        )
    before, after = _means(
        x_ptr, factor_ptr, x_mean, kept_mean, channels, N, M, SPAN, PIECE, SPANS, BLOCKS
    )
    scale = tl.sqrt_rn(tl.div_rn(before + EPSILON, after + EPSILON))
    scale = tl.where(tl.abs(scale) < float("inf"), scale, 1.0)  # false for NaN
    copied = False
    if dense is not None:
        copied = row % sequence < dense
    for block in range(BLOCKS):
        column, x, kept = selected_block(
            x_ptr, factor_ptr, None, block, channels, N, M, SPAN, PIECE, SPANS
        )
        y = ()
        for i in tl.static_range(SPAN):
            corrected = (kept[i].to(tl.float32) * scale).to(x[i].dtype)
            y = y + (tl.where(copied, x[i], corrected),)
        store_channels(y_ptr, column, channels, True, y, PIECE)


# ---- launch --------------------------------------------------------------------------------------

CHANNELS_A_THREAD = 32  # all at once, if there is no correction
THREADS = 128


def launch(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a kernel on ``x`` [..., channels], not empty and of a type in ``DTYPES``; n < m."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    experts = None if offsets is None else len(offsets)
    kernel, constants, options = choose(rows.shape[1], x.dtype, n, m, correction, experts)
    sequence = 1 if x.dim() == 1 else x.shape[-2]
    arguments: dict[str, Any] = {
        "x_ptr": rows,
        "factor_ptr": None if factor is None else factor.contiguous(),
        "ends_ptr": None if offsets is None else offsets.contiguous(),
        "y_ptr": y,
        "channels": rows.shape[1],
        "x_stride": rows.stride(0),
        "sequence": sequence if dense_prefix else None,
        "dense": dense_prefix or None,
        "experts": experts,
    }
    programs = len(rows)
    if correction is None:
        arguments["tokens"] = len(rows)
        block = constants["SPANS"] * constants["SPAN"]
        programs = triton.cdiv(len(rows), constants["ROWS"]) * triton.cdiv(rows.shape[1], block)
    kernel[(programs,)](**arguments, **constants, **options)
    return y


def choose(
    channels: int,
    dtype: torch.dtype,
    n: int,
    m: int,
    correction: str | None,
    experts: int | None,
) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Return the kernel for a problem, its constants and how it is to be compiled."""
    piece = 16 // dtype.itemsize
    span = max(m, piece)
    spans = triton.next_power_of_2(triton.cdiv(channels, span))
    bits = 0 if experts is None else (experts - 1).bit_length()
    constants = {"N": n, "M": m, "SPAN": span, "PIECE": piece, "EXPERT_BITS": bits}
    # 3.9 warns that the default of this option will change
    options = {"num_warps": THREADS // 32, "enable_fp_fusion": True}
    if correction is None:
        spans = min(spans, THREADS)
        rows = THREADS // spans * (CHANNELS_A_THREAD // span)
        return nm_select_kernel, {**constants, "SPANS": spans, "ROWS": rows}, options
    spans = min(spans, 2 * THREADS)
    constants |= {"SPANS": spans, "BLOCKS": triton.cdiv(channels, spans * span)}
    constants |= {"VARIANCE": correction == "variance"}
    return nm_select_corrected_kernel, constants, {**options, "num_warps": max(1, spans // 32)}
