"""Keep the two best of every four channels of each token, in compressed form.

    kept                        = the channels that nm_select keeps: 2:4, with its keys and its ties
    values, metadata            = x at the kept channels, as two_four.py lays them out
    row_scale                   = correction, or empty without one

    quantize       values                                        row_scale
    None           x, bit for bit                                correction
    int8           rint(x · (1 / scale)), at most ±127           scale · correction
    fp8            e4m3(x · (1 / scale)), at most ±448           scale · correction

    scale = max(amax / limit, 2^-126)       amax = max |x| over the kept channels, limit 127 or 448

in fp32, every operation rounded to nearest even. A token that keeps a NaN or an infinity has scale
NaN and codes 0, so that its product is NaN, as it would be of dense rows. The correction is None,
so 1, or "norm" as in nm_select.py: its energies are those of x and of the kept x, before they are
quantised. "variance" shifts what it measures and so belongs to nm_select.

A token's product with a weight is (values @ weight) · row_scale, see nm_matmul.
"""

from __future__ import annotations

import math

import torch

from amber_compile.errors import OptionError, choices
from amber_compile.kernels.arguments import check_selection
from amber_compile.kernels.nm_select import correction_scale, selected
from amber_compile.kernels.registration import LIBRARY, define
from amber_compile.kernels.two_four import TILE_COLUMNS, compress, pack_metadata, tile_count

DTYPES = (torch.bfloat16, torch.float16)
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LIMITS = {"int8": 127.0, "fp8": 448.0}
SMALLEST_SCALE = 2.0**-126
"""The smallest normal number: its reciprocal is finite, and a token of zeros needs no exception."""

Compressed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# ---- reference -----------------------------------------------------------------------------------


def nm_compress_reference(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None = None,
    correction: str | None = None,
) -> Compressed:
    """Compress in plain tensor operations, on any device: the definition of the operator."""
    check_compression(x, factor, quantize, correction)
    x = _rows(x)
    kept = selected(x, factor, 2, 4)
    values, nibbles = compress(x, kept)
    row_scale = x.new_empty(0, dtype=torch.float32)
    if correction is not None:
        row_scale = correction_scale(x, torch.where(kept, x, 0), correction)[:, 0]
    if quantize is None:
        return values, pack_metadata(nibbles, 16), row_scale
    values, scale = _quantized(values, quantize)
    return values, pack_metadata(nibbles, 8), scale * row_scale if correction else scale


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` [..., channels] as [tokens, channels]: a view if its strides allow."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _quantized(values: torch.Tensor, quantize: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [tokens, channels] and scale [tokens] of ``values``."""
    values, limit = values.float(), LIMITS[quantize]
    amax = values.abs().amax(-1, keepdim=True)
    # divided by a tensor: on a GPU a division by a number is a multiplication by its reciprocal
    scale = (amax / torch.full_like(amax, limit)).clamp(min=SMALLEST_SCALE)
    finite = amax.isfinite()
    codes = (values * scale.reciprocal()).clamp(-limit, limit).where(finite, 0)
    codes = codes.round() if quantize == "int8" else codes
    return codes.to(CODES[quantize]), scale.where(finite, math.nan)[:, 0]


# ---- launch --------------------------------------------------------------------------------------


def _nm_compress_cuda(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None = None,
    correction: str | None = None,
) -> Compressed:
    check_compression(x, factor, quantize, correction)
    from amber_compile.kernels.cuda.nm_compress import launch  # needs Triton

    x = _rows(x)
    factor = None if factor is None else factor.contiguous()
    with torch.cuda.device(x.device):
        return launch(x if x.stride(1) == 1 else x.contiguous(), factor, quantize, correction)


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None = None,
    correction: str | None = None,
) -> Compressed:
    check_compression(x, factor, quantize, correction)
    tokens, channels = math.prod(x.shape[:-1]), x.shape[-1]
    scaled = quantize is not None or correction is not None
    return (
        x.new_empty([tokens, channels // 2], dtype=CODES[quantize] if quantize else x.dtype),
        x.new_empty([tile_count(tokens), channels // TILE_COLUMNS, 32], dtype=torch.int32),
        x.new_empty([tokens if scaled else 0], dtype=torch.float32),
    )


def check_compression(
    x: torch.Tensor, factor: torch.Tensor | None, quantize: str | None, correction: str | None
) -> None:
    """Raise ``OptionError`` unless ``x`` can be selected, quantised and corrected like that.

    As in arguments.py a rule about a symbolic size is left to run time.
    """
    if x.dtype not in DTYPES:
        valid = ", ".join(map(str, DTYPES))
        raise OptionError(f"x has dtype {x.dtype}; valid for the compressed form: {valid}")
    check_selection(x, factor, 2, 4, None, 0, 0)
    channels = x.shape[-1]
    if isinstance(channels, int) and (channels % TILE_COLUMNS or not channels):
        raise OptionError(f"x has {channels} channels; valid: a multiple of {TILE_COLUMNS}")
    if quantize is not None and quantize not in CODES:
        raise OptionError(choices("quantize", quantize, (None, *CODES)))
    if correction == "variance":
        raise OptionError("correction='variance' needs nm_select; valid here: None, norm")
    if correction not in (None, "norm"):
        raise OptionError(choices("correction", correction, (None, "norm")))


nm_compress = define(
    "nm_compress(Tensor x, Tensor? factor, str? quantize=None, str? correction=None) "
    "-> (Tensor values, Tensor metadata, Tensor row_scale)",
    nm_compress_reference,
    _fake,
)

LIBRARY.impl("nm_compress", _nm_compress_cuda, "CUDA")
