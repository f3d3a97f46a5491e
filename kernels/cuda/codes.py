"""Codes of 8 bits in a GPU's registers, rounded like those of kernels/codes.py, bit for bit.

Nothing that a code or a scale comes from may be contracted to a fused multiply-add: kernels that
call this are compiled without (``enable_fp_fusion=False``).
"""

# ruff: noqa: RET505 - Triton compiles what follows a return

from __future__ import annotations

import torch
import triton
import triton.language as tl

from amber_compile.kernels.codes import LIMITS, SMALLEST_SCALE

SCALE_FLOOR = tl.constexpr(SMALLEST_SCALE)
INT8_LIMIT, FP8_LIMIT = tl.constexpr(LIMITS["int8"]), tl.constexpr(LIMITS["fp8"])


@triton.jit
def magnitude_bits(value):
    """Return integers that order like |value| in fp32, every NaN beyond infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax, FP8: tl.constexpr):
    """Return the scale of a row whose largest magnitude is ``amax``, and what to multiply by."""
    scale = tl.maximum(tl.div_rn(amax, FP8_LIMIT if FP8 else INT8_LIMIT), SCALE_FLOOR)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def code_of(value, FP8: tl.constexpr, CONVERT: tl.constexpr):
    """Return ``value`` rounded to int8 or e4m3, in the lowest byte of an int32.

    It need not be clamped: v · (1 / scale) exceeds the limit by less than a code's half step.
    """
    if not FP8:  # the sum's last place is worth 1
        return (value + 12582912.0).to(tl.int32, bitcast=True)
    elif CONVERT:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        tiny = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) & 0xF  # last place 2^-9
        return tl.where(magnitude < 0x3C800000, tiny, normal) | ((bits >> 24) & 0x80)


def converts(device: torch.device) -> bool:
    """Return whether kernels for a device leave the rounding to e4m3 to its hardware.

    It can since sm_89. The interpreter's own conversion loses carries (126.47 becomes 64).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
