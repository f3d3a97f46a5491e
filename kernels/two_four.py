"""The compressed form of 2:4 sparse rows, as sparse tensor cores read it.

    x         [T, K]                     dense, two of every four channels kept; K a multiple of 64
    values    [T, K/2]                   the kept ones, in the order of their channels
    nibbles   [T, K/4]                   i0 | i1 << 2: where in their group they were, i0 < i1
    metadata  [ceil(T/16), K/64, 32]     the nibbles, eight to a word of 32 bits

A word belongs to one lane of the warp that holds 16 rows and 64 channels of x, lane = 4 g + t:

    operands     bits 0-15                        bits 16-31
    16 bit       row g, channels 16 t + 0..15     row g + 8, the same channels
    8 bit        row g + 8 (t & 1), channels 32 (t >> 1) + 0..15        ... + 16..31

lower channels in lower bits. So a warp reads 128 consecutive bytes, whatever the instruction
(mma.sp m16n8k32 and m16n8k64, wgmma.sp m64nNk32 and m64nNk64). The rows of the last tile that x
does not have hold ``EMPTY``: a nibble that is not one of the six pairs is undefined behaviour.

Nothing here looks at a value, so nothing waits for a GPU: an illegal nibble is not noticed.
"""

from __future__ import annotations

import torch

from amber_compile.errors import OptionError

TILE_ROWS = 16
TILE_COLUMNS = 64
EMPTY = 0x44444444
"""Eight times the nibble of the first two channels of a group."""

INTEGERS = {2: torch.int16, 1: torch.int8}
"""As what values of so many bytes are moved."""

SIDE_BY_SIDE = {16: 4, 8: 8}
"""How many nibbles of one row a word holds, by the bits of an operand."""


def tile_count(tokens: int) -> int:
    """Return how many tiles hold that many rows."""
    return (tokens + TILE_ROWS - 1) // TILE_ROWS


def compress(x: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [T, K/2] and nibbles [T, K/4] of ``x`` [T, K], two kept of every four.

    ``kept`` [T, K] is boolean. Values are moved as integers: a float may lose the bits of its NaN.
    """
    groups = kept.view(kept.shape[0], kept.shape[1] // 4, 4).byte()
    places = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    integers = x.contiguous().view(INTEGERS[x.dtype.itemsize]).view(groups.shape)
    values = integers.gather(-1, places).flatten(1).view(x.dtype)
    return values, (places[..., 0] | places[..., 1] << 2).byte()


def pack_metadata(nibbles: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the metadata int32 [ceil(T/16), K/64, 32] of ``nibbles`` uint8 [T, K/4].

    Raises:
        OptionError: if the operands have neither 16 nor 8 bits, or K is no multiple of 64.
    """
    run = _side_by_side(bits)
    if nibbles.dtype != torch.uint8 or nibbles.dim() != 2 or nibbles.shape[1] % 16:
        raise OptionError(
            f"nibbles are {nibbles.dtype} {list(nibbles.shape)}; valid: torch.uint8 [T, K/4] with "
            f"K a multiple of {TILE_COLUMNS}"
        )
    tiles, blocks = tile_count(nibbles.shape[0]), nibbles.shape[1] // 16
    missing = tiles * TILE_ROWS - nibbles.shape[0]
    rows = torch.nn.functional.pad(nibbles, (0, 0, 0, missing), value=EMPTY & 15).int()
    # [tile, half, g, block, chunk, nibble], where the lane is g, t = chunk (16 bit) or g, chunk,
    # half (8 bit)
    rows = rows.view(tiles, 2, 8, blocks, 16 // run, run).permute(0, 3, 2, 4, 1, 5)
    words = rows.reshape(tiles, blocks, 32, 8) << _shifts(nibbles.device)
    return words.sum(-1, dtype=torch.int32)


def unpack_metadata(metadata: torch.Tensor, tokens: int, bits: int) -> torch.Tensor:
    """Return the nibbles uint8 [tokens, K/4] of ``metadata`` [ceil(tokens/16), K/64, 32].

    Raises:
        OptionError: if the operands have neither 16 nor 8 bits, or the metadata another shape.
    """
    run = _side_by_side(bits)
    tiles = tile_count(tokens)
    shape = metadata.shape
    if metadata.dtype != torch.int32 or len(shape) != 3 or (shape[0], shape[2]) != (tiles, 32):
        raise OptionError(
            f"metadata is {metadata.dtype} {list(shape)}; valid for {tokens} tokens: "
            f"torch.int32 [{tiles}, K/{TILE_COLUMNS}, 32]"
        )
    rows = (metadata.unsqueeze(-1) >> _shifts(metadata.device) & 15).byte()
    rows = rows.view(tiles, shape[1], 8, 16 // run, 2, run).permute(0, 4, 2, 1, 3, 5)
    return rows.reshape(tiles * TILE_ROWS, shape[1] * 16)[:tokens]


def expand(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """Return the dense rows [T, K], zeros included, of a dtype of 16 or 8 bits.

    Raises:
        OptionError: if the shapes or dtypes do not belong together.
    """
    size = values.dtype.itemsize
    if values.dim() != 2 or size not in INTEGERS:
        raise OptionError(
            f"values are {values.dtype} {list(values.shape)}; valid: 16 or 8 bits, [T, K/2]"
        )
    tokens = values.shape[0]
    nibbles = unpack_metadata(metadata, tokens, 8 * size).long()
    if values.shape[1] != 2 * nibbles.shape[1]:
        raise OptionError(
            f"values have shape {list(values.shape)}; valid for metadata "
            f"{list(metadata.shape)}: [{tokens}, {2 * nibbles.shape[1]}]"
        )
    places = torch.stack((nibbles & 3, nibbles >> 2), -1)
    pairs = values.contiguous().view(INTEGERS[size]).view(places.shape)
    dense = pairs.new_zeros(*nibbles.shape, 4).scatter_(-1, places, pairs)
    return dense.view(tokens, 4 * nibbles.shape[1]).view(values.dtype)


def _side_by_side(bits: int) -> int:
    if bits not in SIDE_BY_SIDE:
        raise OptionError(f"operands of {bits} bits; valid: {', '.join(map(str, SIDE_BY_SIDE))}")
    return SIDE_BY_SIDE[bits]


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)
