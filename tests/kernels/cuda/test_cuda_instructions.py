"""The emulated sparse instructions: against dense products, and against the layouts of CUTLASS."""

import numpy as np
import pytest
import torch
from instructions import (
    A_PLACES,
    B_PLACES,
    C_PLACES,
    E4M3,
    KINDS,
    IllegalMetadata,
    decode,
    elements,
    expand,
    from_bf16,
    mma_sp,
    tile_of,
    to_bf16,
    wgmma_places,
    wgmma_sp,
)

from amber_compile.kernels.two_four import pack_metadata

LEGAL = [0x4, 0x8, 0xC, 0x9, 0xD, 0xE]


def nibbles_at_random(rows, columns, seed=0):
    return np.random.default_rng(seed).choice(np.array(LEGAL, np.uint8), (rows, columns // 4))


def packed(nibbles, kind):
    """Return the metadata words [tiles, steps, 32] of ``nibbles``, in the project's format."""
    return pack_metadata(torch.from_numpy(nibbles), KINDS[kind].bits).numpy()


def words_at_random(kind, *shape, seed=0):
    """Return 32-bit words of small whole numbers, so that sums are exact in fp32."""
    values = torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, shape)).float()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
    return values.to(dtype.get(kind, torch.float8_e4m3fn)).view(torch.int32).numpy()


def problem(kind, rows, columns, seed=0):
    """Return words of A [rows, 16] and B [columns, 32], metadata and the exact product."""
    k = 2 * KINDS[kind].columns
    a = words_at_random(kind, rows, k // 2, seed=seed)
    b = words_at_random(kind, columns, k, seed=seed + 1)
    nibbles = nibbles_at_random(rows, k, seed + 2)
    product = expand(elements(a, kind), nibbles) @ elements(b, kind).T
    return a, b, packed(nibbles, kind), product


def steps(kind, metadata):
    """Yield (step, words [tiles, 32], selector) of the two instructions that make up 128 bytes."""
    for step in range(2):
        half = KINDS[kind].bits == 16
        yield step, metadata[:, 0 if half else step], step if half else 0


@pytest.mark.parametrize("kind", KINDS)
def test_mma_sp_is_the_product_of_the_expanded_operand(kind):
    a, b, metadata, product = problem(kind, 16, 8)
    d = np.zeros((32, 4), KINDS[kind].accumulator)
    for step, words, selector in steps(kind, metadata):
        fragment_a = a[:, 8 * step :][:, :8][A_PLACES]
        fragment_b = b[:, 16 * step :][:, :16][B_PLACES]
        d = mma_sp(fragment_a, fragment_b, d, words[0], selector, kind)
    np.testing.assert_array_equal(tile_of(d, C_PLACES), product)


@pytest.mark.parametrize("columns", [8, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_wgmma_sp_is_the_product_of_the_expanded_operand(kind, columns):
    a, b, metadata, product = problem(kind, 64, columns)
    d = np.zeros((128, columns // 2), KINDS[kind].accumulator)
    for step, words, selector in steps(kind, metadata):
        tiles = a[:, 8 * step :][:, :8], b[:, 16 * step :][:, :16]
        d = wgmma_sp(d, *tiles, words.reshape(-1), selector, kind)
    np.testing.assert_array_equal(tile_of(d, wgmma_places(columns)), product)


@pytest.mark.parametrize("places", [A_PLACES, B_PLACES, C_PLACES, wgmma_places(40)])
def test_a_fragment_holds_every_element_once(places):
    rows, columns = places
    indices = rows * (columns.max() + 1) + columns
    assert sorted(indices.ravel()) == list(range(indices.size))


def test_int8_sums_are_exact_or_an_error():
    a = np.full((32, 4), 0x7F7F7F7F)
    c = np.full((32, 4), np.iinfo(np.int32).max, np.int32)
    with pytest.raises(OverflowError, match="accumulator"):
        mma_sp(a, a, c, np.full(32, 0x44444444), 0, "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(LEGAL)))
def test_illegal_metadata_is_an_error(kind, nibble):
    words = np.full(32, 0x44444444)
    words[4] = 0x44444440 | nibble
    with pytest.raises(IllegalMetadata, match=f"nibble {nibble:#x}"):
        decode(words, 0, kind)


def test_a_selector_reads_only_its_lanes():
    words = np.full(32, 0x44444444)
    words[2::4] = 0  # illegal, in lanes of selector 1
    decode(words, 0, "bf16")
    with pytest.raises(IllegalMetadata, match="nibble"):
        decode(words, 1, "bf16")
    with pytest.raises(IllegalMetadata, match="selector 1"):
        decode(np.full(32, 0x44444444), 1, "int8")


# ---- CUTLASS -------------------------------------------------------------------------------------
#
# ``reorder_meta`` of tools/util/host_reorder.h for sm_80 and the kernels' column-major interleaved
# iterator: an independent statement of which lane holds the metadata of which rows and columns.


def reorder_meta(metadata, group, interweave):
    """Move the elements [rows, columns] as CUTLASS does for tensor operations."""
    moved = np.empty_like(metadata)
    for m, k in np.ndindex(*metadata.shape):
        row = m // group * group + m % 8 * interweave + m % group // 8
        column = k
        if row % 2 == 0 and column % 2 == 1:
            row, column = row + 1, column - 1
        elif row % 2 == 1 and column % 2 == 0:
            row, column = row - 1, column + 1
        moved[row, column] = metadata[m, k]
    return moved


def halves_of(nibbles):
    """Return the metadata [rows, K/16] as the 16-bit numbers that CUTLASS compresses to."""
    return (nibbles.reshape(len(nibbles), -1, 4).astype(np.int64) << 4 * np.arange(4)).sum(-1)


def test_cutlass_orders_16_bit_metadata_as_we_do():
    nibbles = nibbles_at_random(64, 256)
    ours = packed(nibbles, "bf16").astype(np.int64) & 0xFFFFFFFF
    theirs = reorder_meta(halves_of(nibbles), group=32, interweave=4)
    for pair, step, lane in np.ndindex(2, 8, 32):
        low, high = theirs[32 * pair + lane, 2 * step : 2 * step + 2]
        g, t = lane >> 2, lane & 3  # lanes 2, 3 of a quad have the second tile of 16 rows
        mine = ours[2 * pair + (t >> 1), step // 2, 4 * g + 2 * (step & 1) + (t & 1)]
        assert mine == low | high << 16


def test_cutlass_orders_8_bit_metadata_as_we_do():
    nibbles = nibbles_at_random(64, 256)
    ours = packed(nibbles, "int8").astype(np.int64) & 0xFFFFFFFF
    halves = halves_of(nibbles)
    theirs = reorder_meta(halves[:, ::2] | halves[:, 1::2] << 16, group=16, interweave=2)
    for tile, step, lane in np.ndindex(4, 4, 32):
        assert ours[tile, step, lane] == theirs[16 * tile + lane // 2, 2 * step + lane % 2]


# ---- elements ------------------------------------------------------------------------------------


def test_e4m3_is_that_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).double().numpy())


def test_bf16_rounds_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(values)), expected)
