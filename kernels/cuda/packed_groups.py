"""Groups of four 16-bit channels, each one integer of 64 bits: the parts of nm_compress's kernels.

What is kept of a group is one integer of 32 bits. Selection is a tournament on integer keys, two
pairs and then their best and worst; a channel enters it with its place in the group above its
value, so that what wins brings its place along.
"""

# ruff: noqa: RET505 - Triton compiles what follows a return

from __future__ import annotations

import triton
import triton.language as tl

from amber_compile.kernels.nm_select import EPSILON

ENERGY_FLOOR = tl.constexpr(EPSILON)

# ---- selection -----------------------------------------------------------------------------------


@triton.jit
def float_of(bits, FLOAT16: tl.constexpr):
    """Return the fp32 value of the fp16 or bf16 number in the lower half of ``bits``."""
    if FLOAT16:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _key(bits, factor, FACTOR: tl.constexpr, FLOAT16: tl.constexpr):
    """Return an integer that orders like |x · factor|, with all NaN alike above infinity."""
    if FACTOR:
        score = float_of(bits, FLOAT16) * factor
        return tl.minimum(score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    else:
        return tl.minimum(bits & 0x7FFF, 0x7C01 if FLOAT16 else 0x7F81)


@triton.jit
def _channels(words):
    """Return the four channels [rows, groups] of each group, as 16 bits of an int32."""
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    return low & 0xFFFF, (low >> 16) & 0xFFFF, high & 0xFFFF, (high >> 16) & 0xFFFF


@triton.jit
def load_factors(factor_ptr, start, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the factors [1, groups] of the four channels of each group, if there are any."""
    if factor_ptr is None:
        return 0, 0, 0, 0
    else:
        at = 4 * start + tl.arange(0, 4 * BLOCK)
        factor = tl.load(factor_ptr + at, mask=at < 4 * GROUPS, other=0.0)
        even, odd = tl.split(tl.reshape(factor, (BLOCK, 2, 2)))
        f0, f2 = tl.split(even)
        f1, f3 = tl.split(odd)
        return f0[None, :], f1[None, :], f2[None, :], f3[None, :]


@triton.jit
def select_two(words, factors, FACTOR: tl.constexpr, FLOAT16: tl.constexpr):
    """Return what is kept of each group, in order: x | place << 16 | place << 18."""
    x0, x1, x2, x3 = _channels(words)
    k0, k1 = _key(x0, factors[0], FACTOR, FLOAT16), _key(x1, factors[1], FACTOR, FLOAT16)
    k2, k3 = _key(x2, factors[2], FACTOR, FLOAT16), _key(x3, factors[3], FACTOR, FLOAT16)
    left = tl.minimum(k0, k1) >= tl.maximum(k2, k3)  # both are of the left pair
    right = tl.minimum(k2, k3) > tl.maximum(k0, k1)
    x1, x2, x3 = x1 | 0x50000, x2 | 0xA0000, x3 | 0xF0000
    first = tl.where(right, x2, tl.where(left | (k0 >= k1), x0, x1))
    second = tl.where(left, x1, tl.where(right | (k3 > k2), x3, x2))
    return first, second


@triton.jit
def smoothed(first, second, smooths, FLOAT16: tl.constexpr):
    """Return what is kept of each group in fp32, times the ``smooths`` of the four channels."""
    place = first & 0x30000
    one = tl.where(place == 0, smooths[0], tl.where(place == 0x10000, smooths[1], smooths[2]))
    place = second & 0xC0000
    other = tl.where(place == 0xC0000, smooths[3], smooths[2])
    other = tl.where(place == 0x40000, smooths[1], other)
    return float_of(first & 0xFFFF, FLOAT16) * one, float_of(second & 0xFFFF, FLOAT16) * other


@triton.jit
def pair_of(first, second):
    return (first & 0xFFFF) | (second << 16)


@triton.jit
def nibbles_of(first, second, N: tl.constexpr):
    """Return the nibbles of N groups side by side: [rows, groups / N]."""
    nibbles = ((first & 0x30000) | (second & 0xC0000)) >> 16
    runs = tl.reshape(nibbles, (nibbles.shape[0], nibbles.shape[1] // N, N))
    return tl.sum(runs << (4 * tl.arange(0, N))[None, None, :], axis=2)


# ---- energies ------------------------------------------------------------------------------------


@triton.jit
def add_energies(energies, words, first, second, FLOAT16: tl.constexpr):
    """Add to the two sums the squares of each group, and of what is kept of it."""
    x0, x1, x2, x3 = _channels(words)
    before = _add_square(_add_square(energies[0], x0, FLOAT16), x1, FLOAT16)
    before = _add_square(_add_square(before, x2, FLOAT16), x3, FLOAT16)
    return before, _add_square(_add_square(energies[1], first, FLOAT16), second, FLOAT16)


@triton.jit
def _add_square(total, bits, FLOAT16: tl.constexpr):
    x = float_of(bits, FLOAT16)
    return tl.fma(x, x, total)


@triton.jit
def norm_correction(energies, GROUPS: tl.constexpr):
    """Return the norm correction [rows] of two energies [rows, groups]."""
    before = tl.div_rn(tl.sum(energies[0], axis=1), 4.0 * GROUPS) + ENERGY_FLOOR
    after = tl.div_rn(tl.sum(energies[1], axis=1), 4.0 * GROUPS) + ENERGY_FLOOR
    scale = tl.sqrt_rn(tl.div_rn(before, after))
    return tl.where(scale < float("inf"), scale, 1.0)  # neither infinite nor NaN
