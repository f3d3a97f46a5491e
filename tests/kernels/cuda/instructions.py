"""What the sparse tensor-core instructions compute, in NumPy.

    mma.sp         D[16, 8] = A[16, K] · B[8, K]ᵀ + C          one warp
    wgmma.sp       D[64, N] = A[64, K] · B[N, K]ᵀ + D          one warpgroup, warp w has rows 16w..

K = 32 for bf16 and fp16, 64 for int8 and e4m3: 64 bytes either way, so everything is counted in
32-bit words. A is compressed: of four elements two are stored, and a nibble i0 | i1 << 2 says
which. i0 < i1, or the hardware's answer is undefined and ``IllegalMetadata`` is raised here.

    lane = 4g + t     register     element
    A 16 x 8 words    r = 0..3     row g + 8(r & 1), word t + 4(r >> 1)
    B 8 x 16 words    r = 0..3     row (output column) g, word t + 4r
    C, D 16 x 8       i = 0..3     row g + 8(i >> 1), column 2t + (i & 1)
    D of wgmma        i = 0..N/2   row g + 8(i >> 1 & 1), column 8(i >> 2) + 2t + (i & 1)
    metadata 16 bit   selector s   lanes t = 2s, 2s + 1; low half: row g, columns 16(t & 1)..+15;
                                   high half: row g + 8
    metadata 8 bit    selector 0   row g + 8(t & 1), columns 32(t >> 1)..+31

Sources: PTX ISA, sections "Multiply-and-Accumulate instructions for sparse matrix A" of mma and
wgmma; CUTLASS' ``reorder_meta`` agrees (test_cuda_instructions.py). Sums are exact and rounded
once, where the hardware rounds on the way: a result here is the best one possible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

G, T = np.arange(32) // 4, np.arange(32) % 4


class IllegalMetadata(ValueError):
    """Metadata for which the hardware's answer is undefined."""


@dataclass(frozen=True)
class Operands:
    """A type of A and B: how PTX writes it, its width, and what the sums are kept in."""

    ptx: str
    bits: int
    accumulator: type

    @property
    def columns(self) -> int:
        """K of one instruction."""
        return 512 // self.bits


KINDS = {
    "bf16": Operands("bf16", 16, np.float32),
    "fp16": Operands("f16", 16, np.float32),
    "int8": Operands("s8", 8, np.int32),
    "fp8": Operands("e4m3", 8, np.float32),
}

# ---- elements ------------------------------------------------------------------------------------


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to the bits of bf16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _e4m3_values() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    fraction = np.where(exponent == 0, mantissa / 4, 1 + mantissa / 8)  # subnormals: 2⁻⁶ · m/8
    values = np.where(code >> 7, -1.0, 1.0) * fraction * 2.0 ** (exponent - 7)
    return np.where(code & 127 == 127, np.nan, values)


E4M3 = _e4m3_values()


def elements(words: np.ndarray, kind: str) -> np.ndarray:
    """Return the elements [..., n · 32 / bits] of ``words`` [..., n], in float64 or int64."""
    words = np.ascontiguousarray(words, np.uint32)
    if kind == "bf16":
        return from_bf16(words.view(np.uint16)).astype(np.float64)
    if kind == "fp16":
        return words.view(np.float16).astype(np.float64)
    if kind == "int8":
        return words.view(np.int8).astype(np.int64)
    return E4M3[words.view(np.uint8)]


# ---- fragments -----------------------------------------------------------------------------------


def _by_register(entry, registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the (rows, columns) [32 lanes, registers] that ``entry(register)`` tells."""
    rows, columns = zip(*(entry(register) for register in range(registers)), strict=True)
    return np.stack(rows, 1), np.stack(columns, 1)


A_PLACES = _by_register(lambda r: (G + 8 * (r & 1), T + 4 * (r >> 1)), 4)
B_PLACES = _by_register(lambda r: (G, T + 4 * r), 4)
C_PLACES = _by_register(lambda i: (G + 8 * (i >> 1), 2 * T + (i & 1)), 4)


def wgmma_places(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, columns) [128 threads, N/2 registers] of the accumulators of a warpgroup."""
    rows, places = _by_register(
        lambda i: (G + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * T + (i & 1)), columns // 2
    )
    return np.concatenate([rows + 16 * w for w in range(4)]), np.tile(places, (4, 1))


def tile_of(fragment: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Put the registers [threads, registers] together to the tile they are a part of."""
    rows, columns = places
    tile = np.empty((rows.max() + 1, columns.max() + 1), fragment.dtype)
    tile[places] = fragment
    return tile


# ---- metadata ------------------------------------------------------------------------------------


def _nibbles(halves: np.ndarray) -> np.ndarray:
    """Split 16-bit numbers [..., n] into nibbles [..., 4n], the lowest first."""
    nibbles = halves[..., None].astype(np.uint32) >> (4 * np.arange(4)) & 15
    return nibbles.reshape(*halves.shape[:-1], -1)


def decode(metadata: np.ndarray, selector: int, kind: str) -> np.ndarray:
    """Return the nibbles [16 rows, K/4] that one instruction reads from the words of 32 lanes."""
    bits = KINDS[kind].bits
    word = np.asarray(metadata).astype(np.int64) & 0xFFFFFFFF
    low, high = word & 0xFFFF, word >> 16
    if selector not in ((0, 1) if bits == 16 else (0,)):
        raise IllegalMetadata(f"selector {selector} of an instruction for {kind}")
    halves = np.stack([low, high], -1).reshape(8, 2, 2, 2)  # g, t >> 1, t & 1, half
    # to chunks of 16 columns: rows 0..7 and 8..15 are told apart by the half, or by t & 1
    halves = halves[:, selector].transpose(2, 0, 1) if bits == 16 else halves.transpose(2, 0, 1, 3)
    nibbles = _nibbles(halves.reshape(16, -1))
    if (nibbles & 3 >= nibbles >> 2).any():
        worst = int(nibbles[nibbles & 3 >= nibbles >> 2][0])
        raise IllegalMetadata(f"nibble {worst:#x} keeps place {worst & 3}, then {worst >> 2}")
    return nibbles


def expand(values: np.ndarray, nibbles: np.ndarray) -> np.ndarray:
    """Return the dense matrix [rows, K] of the kept values [rows, K/2] at their places."""
    rows, groups = nibbles.shape
    dense = np.zeros((rows, groups, 4), values.dtype)
    kept = values.reshape(rows, groups, 2)
    places = np.stack([nibbles & 3, nibbles >> 2], -1).astype(np.int64)
    np.put_along_axis(dense, places, kept, -1)
    return dense.reshape(rows, 4 * groups)


# ---- instructions --------------------------------------------------------------------------------


def _sum(start: np.ndarray, product: np.ndarray, kind: str) -> np.ndarray:
    total = start.astype(product.dtype) + product
    if KINDS[kind].accumulator is not np.int32:
        return total.astype(np.float32)
    if np.abs(total).max(initial=0) > np.iinfo(np.int32).max:
        raise OverflowError("an int32 accumulator overflows")
    return total.astype(np.int32)


def mma_sp(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, metadata: np.ndarray, selector: int, kind: str
) -> np.ndarray:
    """Run mma.sp on the registers a, b, c [32, 4] and metadata [32] of a warp: return d [32, 4]."""
    nibbles = decode(metadata, selector, kind)
    dense = expand(elements(tile_of(a, A_PLACES), kind), nibbles)
    product = dense @ elements(tile_of(b, B_PLACES), kind).T
    return _sum(c, product[C_PLACES], kind)


def wgmma_sp(
    d: np.ndarray, a: np.ndarray, b: np.ndarray, metadata: np.ndarray, selector: int, kind: str
) -> np.ndarray:
    """Run wgmma.sp on accumulators [128, N/2], tiles a [64, 8], b [N, 16] of words and metadata
    [128]: return the new accumulators."""
    nibbles = np.concatenate([decode(w, selector, kind) for w in metadata.reshape(4, 32)])
    product = expand(elements(a, kind), nibbles) @ elements(b, kind).T
    return _sum(d, product[wgmma_places(len(b))], kind)
