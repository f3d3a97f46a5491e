"""The codes of nm_quantize.py and quantize_rows.py on a GPU, for every pattern: dense in and out.

A program has a token. It sweeps over it once for the largest magnitude and the energies of what is
kept, in spans of 16 channels or a group (channel_groups.py), and writes codes: from registers if
the token fits into one block, else in a second sweep, which finds the token in the L1 cache and
selects again. The variance correction has one more sweep, for its means.

Nothing may be contracted to a fused multiply-add: codes and scales are those of the reference, bit
for bit. Only energies are summed in another order.
"""

# ruff: noqa: RUF005 - Triton cannot unpack in a tuple

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from amber_compile.kernels.codes import CODES
from amber_compile.kernels.cuda.channel_groups import load_channels, store_channels
from amber_compile.kernels.cuda.codes import code_of, converts, magnitude_bits, scale_of
from amber_compile.kernels.cuda.nm_select import (
    EPSILON,
    add_energy,
    expert_of,
    plus,
    selected_block,
)

PIECE_OF_CODES = tl.constexpr(16)  # bytes stored at once

# ---- kernel --------------------------------------------------------------------------------------


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _kept_block(
    x_ptr, factor_ptr, smooth_ptr,            # of the token's row; the latter two may be None
    copied, channels, block,                  # the first: whether all channels are kept, or None
    N: tl.constexpr, M: tl.constexpr,
    SPAN: tl.constexpr, PIECE: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Return where a block's spans begin, their channels, those kept, and these smoothed."""
    if N == M:
        column = (block * SPANS + tl.arange(0, SPANS)) * SPAN
        x = load_channels(x_ptr, column, channels, True, SPAN, PIECE)
        kept = x
    else:
        column, x, kept = selected_block(
            x_ptr, factor_ptr, copied, block, channels, N, M, SPAN, PIECE, SPANS
        )
    values = ()
    if smooth_ptr is None:
        for i in tl.static_range(SPAN):
            values = values + (kept[i].to(tl.float32),)
    else:
        smooth = load_channels(smooth_ptr, column, channels, True, SPAN, 4)
        for i in tl.static_range(SPAN):
            values = values + (kept[i].to(tl.float32) * smooth[i],)
    return column, x, kept, values


@triton.jit
def _measure(sums, block, x_mean, kept_mean, channels, SUM: tl.constexpr):
    """Add a block to the largest magnitude and, if asked, to the energies about two means."""
    largest, before, after = sums
    column, x, kept, values = block
    for i in tl.static_range(len(values)):
        largest = tl.maximum(largest, magnitude_bits(values[i]))
    if SUM:
        before = add_energy(before, x, x_mean, column, channels)
        after = add_energy(after, kept, kept_mean, column, channels)
    return largest, before, after


@triton.jit
def _sweep(
    x_ptr, factor_ptr, smooth_ptr, copied, channels,
    x_mean, kept_mean, SUM: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr,
    SPANS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the token's largest magnitude and means, and the last block with its smoothed ones."""
    zeros = tl.full((SPANS,), 0.0, tl.float32)
    sums = (tl.full((SPANS,), 0, tl.int32), zeros, zeros)
    for i in range(BLOCKS - 1):
        block = _kept_block(
            x_ptr, factor_ptr, smooth_ptr, copied, channels, i, N, M, SPAN, PIECE, SPANS
        )
        sums = _measure(sums, block, x_mean, kept_mean, channels, SUM)
    last = _kept_block(
        x_ptr, factor_ptr, smooth_ptr, copied, channels, BLOCKS - 1, N, M, SPAN, PIECE, SPANS
    )
    largest, before, after = _measure(sums, last, x_mean, kept_mean, channels, SUM)
    count = channels.to(tl.float32)
    before = tl.div_rn(tl.reduce(before, 0, plus), count)
    after = tl.div_rn(tl.reduce(after, 0, plus), count)
    return tl.reduce(largest, 0, _larger), before, after, last


@triton.jit
def _store_codes(
    codes_ptr, column, values, finite, inverse, channels, FP8: tl.constexpr, CONVERT: tl.constexpr
):
    codes = ()
    for i in tl.static_range(len(values)):
        value = tl.where(finite, values[i], 0.0) * inverse
        codes = codes + (code_of(value, FP8, CONVERT).to(tl.int8),)
    store_channels(codes_ptr, column, channels, True, codes, PIECE_OF_CODES)


@triton.jit(do_not_specialize=["sequence", "dense", "experts"])
def nm_quantize_kernel(
    x_ptr, factor_ptr, smooth_ptr, ends_ptr,  # [tokens, channels], [experts, channels], [channels]
    codes_ptr, row_scale_ptr,                 # [tokens, channels] of int8, [tokens]
    channels, x_stride,
    sequence, dense,                          # of every sequence so many tokens keep all, or None
    experts,                                  # None: one factor, [channels]; else ends [experts]
    N: tl.constexpr, M: tl.constexpr,
    SPAN: tl.constexpr, PIECE: tl.constexpr,  # channels of a thread, and of a load
    SPANS: tl.constexpr, BLOCKS: tl.constexpr,  # per block of a token; per token
    EXPERT_BITS: tl.constexpr,                # binary digits of an expert's number
    NORM: tl.constexpr, VARIANCE: tl.constexpr,  # the correction
    FP8: tl.constexpr,                        # or int8
    CONVERT: tl.constexpr,                    # to fp8 by the hardware
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if ends_ptr is not None:
        factor_ptr += expert_of(ends_ptr, row, experts, EXPERT_BITS).to(tl.int64) * channels
    copied = None
    if dense is not None:
        copied = row % sequence < dense
    x_ptr += row * x_stride
    x_mean = 0.0
    kept_mean = 0.0
    if VARIANCE:
        means = _sweep(
            x_ptr, factor_ptr, smooth_ptr, copied, channels, None, None, True,
            N, M, SPAN, PIECE, SPANS, BLOCKS,
        )  # fmt: skip
        x_mean = means[1]
        kept_mean = means[2]
    largest, before, after, last = _sweep(
        x_ptr, factor_ptr, smooth_ptr, copied, channels, x_mean, kept_mean, NORM or VARIANCE,
        N, M, SPAN, PIECE, SPANS, BLOCKS,
    )  # fmt: skip
    finite = largest < 0x7F800000
    amax = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
    scale, inverse = scale_of(amax, FP8)
    codes_ptr += row * channels
    for i in range(BLOCKS - 1):
        block = _kept_block(
            x_ptr, factor_ptr, smooth_ptr, copied, channels, i, N, M, SPAN, PIECE, SPANS
        )
        _store_codes(codes_ptr, block[0], block[3], finite, inverse, channels, FP8, CONVERT)
    _store_codes(codes_ptr, last[0], last[3], finite, inverse, channels, FP8, CONVERT)
    scale = tl.where(finite, scale, float("nan"))
    if NORM or VARIANCE:
        correction = tl.sqrt_rn(tl.div_rn(before + EPSILON, after + EPSILON))
        scale *= tl.where(correction < float("inf"), correction, 1.0)  # false for NaN
    tl.store(row_scale_ptr + row, scale)


# ---- launch --------------------------------------------------------------------------------------

CHANNELS_A_THREAD = 16  # or a group, if that is more
MOST_THREADS = 512


def launch(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str,
    correction: str | None = None,
    dense_prefix: int = 0,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``x`` [..., channels] of 16 or 32 bits on the current stream; n = m keeps all."""
    codes = torch.empty(x.shape, dtype=CODES[dtype], device=x.device)
    row_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if not x.numel():
        return codes, row_scale
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if n == m:  # no selection, and a correction of 1
        n, m, factor, offsets, correction, dense_prefix = 1, 1, None, None, None, 0
    vectors = (None if each is None else each.contiguous() for each in (factor, smooth, offsets))
    experts = None if offsets is None else len(offsets)
    constants, options = choose(rows.shape[1], x.dtype, n, m, correction, experts)
    nm_quantize_kernel[(len(rows),)](
        *(rows, *vectors, codes.view(torch.int8), row_scale),
        *(rows.shape[1], rows.stride(0)),
        *((1 if x.dim() == 1 else x.shape[-2], dense_prefix) if dense_prefix else (None, None)),
        experts,
        FP8=dtype == "fp8",
        CONVERT=converts(x.device),
        **constants,
        **options,
    )
    return codes, row_scale


def choose(
    channels: int,
    dtype: torch.dtype,
    n: int,
    m: int,
    correction: str | None,
    experts: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants of the kernel for a problem, and how it is to be compiled."""
    span = max(m, CHANNELS_A_THREAD)
    spans = min(triton.next_power_of_2(triton.cdiv(channels, span)), MOST_THREADS)
    constants = {
        "N": n,
        "M": m,
        "SPAN": span,
        "PIECE": 16 // dtype.itemsize,
        "SPANS": spans,
        "BLOCKS": triton.cdiv(channels, spans * span),
        "EXPERT_BITS": 0 if experts is None else (experts - 1).bit_length(),
        "NORM": correction == "norm",
        "VARIANCE": correction == "variance",
    }
    return constants, {"num_warps": max(1, spans // 32), "enable_fp_fusion": False}
