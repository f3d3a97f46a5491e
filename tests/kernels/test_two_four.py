"""The compressed 2:4 form, against the table of its words read one nibble at a time."""

import numpy as np
import pytest
import torch

from amber_compile.errors import OptionError
from amber_compile.kernels.two_four import (
    EMPTY,
    compress,
    expand,
    pack_metadata,
    tile_count,
    unpack_metadata,
)

PAIRS = [0x4, 0x8, 0xC, 0x9, 0xD, 0xE]
DTYPES = [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
SIZES = [(0, 64), (1, 64), (7, 192), (8, 128), (15, 64), (16, 64), (17, 256), (40, 320)]


def nibbles_of(tokens, channels, seed=0):
    choice = np.random.default_rng(seed).choice(PAIRS, (tokens, channels // 4))
    return torch.from_numpy(choice.astype(np.uint8))


def bits_of(tensor):
    return tensor.view({1: torch.int8, 2: torch.int16}[tensor.dtype.itemsize])


def nibble_at(metadata, row, channel, bits):
    """Return the nibble of the group that begins at ``channel``, by the table."""
    tile, row = divmod(row, 16)
    block, channel = divmod(channel, 64)
    half, g = divmod(row, 8)
    if bits == 16:
        t, place = channel // 16, 16 * half + channel % 16
    else:
        t, place = half + 2 * (channel // 32), channel % 32
    return int(metadata[tile, block, 4 * g + t]) >> place & 15


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("tokens", "channels"), SIZES)
def test_every_nibble_lies_where_the_table_says(tokens, channels, bits):
    nibbles = nibbles_of(tokens, channels)
    metadata = pack_metadata(nibbles, bits)
    assert metadata.shape == (tile_count(tokens), channels // 64, 32)
    assert metadata.dtype == torch.int32
    for row in range(16 * tile_count(tokens)):
        for group in range(channels // 4):
            expected = int(nibbles[row, group]) if row < tokens else EMPTY & 15
            assert nibble_at(metadata, row, 4 * group, bits) == expected, (row, group)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("tokens", "channels"), SIZES)
def test_unpacking_undoes_packing(tokens, channels, bits):
    nibbles = nibbles_of(tokens, channels)
    assert torch.equal(unpack_metadata(pack_metadata(nibbles, bits), tokens, bits), nibbles)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_tile_of_missing_rows_is_empty(bits):
    metadata = pack_metadata(nibbles_of(17, 64), bits)
    words = metadata[1].view(8, 4)  # g, t: row 16 is g = 0, the others are missing
    assert (words[1:] == EMPTY).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), SIZES)
def test_expanding_undoes_compressing(tokens, channels, dtype):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(1, 128, (tokens, channels), generator=generator).to(torch.int8)
    x = x.view(dtype) if dtype.itemsize == 1 else x.to(dtype)
    kept = torch.rand(tokens, channels // 4, 4, generator=generator).argsort(-1) < 2
    kept = kept.view(tokens, channels)
    values, nibbles = compress(bits_of(x), kept)
    dense = expand(values.view(dtype), pack_metadata(nibbles, 8 * dtype.itemsize))
    assert (dense.shape, dense.dtype) == (x.shape, dtype)
    assert torch.equal(bits_of(dense), bits_of(x) * kept)


@pytest.mark.parametrize(
    ("kept", "values", "nibble"),
    [
        ([1, 1, 0, 0], [10, 11], 0x4),
        ([1, 0, 1, 0], [10, 12], 0x8),
        ([1, 0, 0, 1], [10, 13], 0xC),
        ([0, 1, 1, 0], [11, 12], 0x9),
        ([0, 1, 0, 1], [11, 13], 0xD),
        ([0, 0, 1, 1], [12, 13], 0xE),
    ],
)
def test_the_six_nibbles(kept, values, nibble):
    x = torch.tensor([[10, 11, 12, 13]], dtype=torch.int8)
    compressed, nibbles = compress(x, torch.tensor([kept]).bool())
    assert (compressed.tolist(), nibbles.tolist()) == ([values], [[nibble]])


def test_no_bit_of_a_nan_is_lost():
    x = torch.arange(-64, 0, dtype=torch.int16).view(1, 64)  # bf16 NaN, each with bits of its own
    kept = torch.tensor([1, 0, 1, 0]).bool().repeat(16)[None]
    values, nibbles = compress(x.view(torch.bfloat16), kept)
    assert torch.equal(bits_of(values), x[kept][None])
    dense = expand(values, pack_metadata(nibbles, 16))
    assert torch.equal(bits_of(dense), x * kept)


# ---- errors --------------------------------------------------------------------------------------

VALUES, METADATA = torch.zeros(17, 32).half(), torch.full((2, 1, 32), EMPTY, dtype=torch.int32)
NIBBLES = nibbles_of(4, 64)

BAD_ARGUMENTS = {
    "operands of 32 bits; valid: 16, 8": lambda: pack_metadata(NIBBLES, 32),
    "operands of 4 bits; valid: 16, 8": lambda: unpack_metadata(METADATA, 17, 4),
    r"nibbles are torch.int32 \[4, 16\]; valid: torch.uint8 \[T, K/4\]": lambda: pack_metadata(
        NIBBLES.int(), 16
    ),
    r"nibbles are torch.uint8 \[4, 15\]; valid: .* multiple of 64": lambda: pack_metadata(
        NIBBLES[:, :15], 16
    ),
    r"nibbles are torch.uint8 \[16\]": lambda: pack_metadata(NIBBLES[0], 16),
    r"metadata is torch.int64 \[2, 1, 32\]; valid for 17 tokens: torch.int32 \[2, K/64, 32\]": (
        lambda: unpack_metadata(METADATA.long(), 17, 16)
    ),
    r"metadata is torch.int32 \[2, 1, 32\]; valid for 16 tokens: torch.int32 \[1, K/64, 32\]": (
        lambda: unpack_metadata(METADATA, 16, 16)
    ),
    r"metadata is torch.int32 \[2, 32\]": lambda: expand(VALUES, METADATA[:, 0]),
    r"values are torch.float32 \[17, 32\]; valid: 16 or 8 bits": lambda: expand(
        VALUES.float(), METADATA
    ),
    r"values are torch.float16 \[32\]": lambda: expand(VALUES[0], METADATA),
    r"values have shape \[17, 16\]; valid for metadata \[2, 1, 32\]: \[17, 32\]": lambda: expand(
        VALUES[:, :16], METADATA
    ),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message):
    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message]()
