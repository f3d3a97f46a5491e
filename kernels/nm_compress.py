"""Keep the two best of every four channels of each token, in compressed form.

    kept                        = the channels that nm_select keeps: 2:4, with its keys and its ties
    values, metadata            = x at the kept channels, as two_four.py lays them out
    row_scale                   = correction, or empty without one

    quantize       values                             row_scale
    None           x, bit for bit                     correction
    int8, fp8      codes of x · smooth (codes.py)     their scale · correction

The smooth vector multiplies in fp32 (None: x itself) what is kept, and codes and scales are made of
that; which channels are kept does not depend on it. A token that keeps a NaN or an infinity, or
that becomes one by smoothing, has scale NaN and codes 0, so that its product is NaN, as it would be
of dense rows. The correction is None, so 1, or "norm" as in nm_select.py: its energies are those of
x and of the kept x, before they are smoothed and quantised. "variance" shifts what it measures and
so belongs to nm_select.

A token's product with a weight is (values @ weight) · row_scale, see nm_matmul.
"""

from __future__ import annotations

import math

import torch

from amber_compile.errors import OptionError, choices
from amber_compile.kernels.arguments import check_selection, check_smooth
from amber_compile.kernels.codes import CODES, quantized
from amber_compile.kernels.nm_select import correction_scale, selected
from amber_compile.kernels.registration import LIBRARY, define
from amber_compile.kernels.two_four import TILE_COLUMNS, compress, pack_metadata, tile_count

DTYPES = (torch.bfloat16, torch.float16)

Compressed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# ---- reference -----------------------------------------------------------------------------------


def nm_compress_reference(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None = None,
    correction: str | None = None,
    smooth: torch.Tensor | None = None,
) -> Compressed:
    """Compress in plain tensor operations, on any device: the definition of the operator."""
    check_compression(x, factor, quantize, correction, smooth)
    x = _rows(x)
    kept = selected(x, factor, 2, 4)
    values, nibbles = compress(x, kept)
    row_scale = x.new_empty(0, dtype=torch.float32)
    if correction is not None:
        row_scale = correction_scale(x, torch.where(kept, x, 0), correction)[:, 0]
    if quantize is None:
        return values, pack_metadata(nibbles, 16), row_scale
    if smooth is not None:
        values = values.float() * smooth[_channels(nibbles)]
    values, scale = quantized(values, quantize)
    return values, pack_metadata(nibbles, 8), scale * row_scale if correction else scale


def _channels(nibbles: torch.Tensor) -> torch.Tensor:
    """Return which channels [tokens, K/2] the ``nibbles`` [tokens, K/4] say are kept."""
    first = torch.arange(0, 4 * nibbles.shape[1], 4, device=nibbles.device)
    return torch.stack((first + (nibbles & 3), first + (nibbles >> 2)), -1).flatten(1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` [..., channels] as [tokens, channels]: a view if its strides allow."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# ---- launch --------------------------------------------------------------------------------------


def _nm_compress_cuda(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None = None,
    correction: str | None = None,
    smooth: torch.Tensor | None = None,
) -> Compressed:
    check_compression(x, factor, quantize, correction, smooth)
    from amber_compile.kernels.cuda.nm_compress import launch  # needs Triton

    x = _rows(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    vectors = (None if each is None else each.contiguous() for each in (factor, smooth))
    factor, smooth = vectors
    with torch.cuda.device(x.device):
        return launch(x, factor, quantize, correction, smooth)


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None = None,
    correction: str | None = None,
    smooth: torch.Tensor | None = None,
) -> Compressed:
    check_compression(x, factor, quantize, correction, smooth)
    tokens, channels = math.prod(x.shape[:-1]), x.shape[-1]
    scaled = quantize is not None or correction is not None
    return (
        x.new_empty([tokens, channels // 2], dtype=CODES[quantize] if quantize else x.dtype),
        x.new_empty([tile_count(tokens), channels // TILE_COLUMNS, 32], dtype=torch.int32),
        x.new_empty([tokens if scaled else 0], dtype=torch.float32),
    )


def check_compression(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    quantize: str | None,
    correction: str | None,
    smooth: torch.Tensor | None,
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
    if smooth is not None and quantize is None:
        raise OptionError("smooth is for what is quantised; valid: None without quantize")
    check_smooth(smooth, x)


nm_compress = define(
    "nm_compress(Tensor x, Tensor? factor, str? quantize=None, str? correction=None, "
    "Tensor? smooth=None) "
    "-> (Tensor values, Tensor metadata, Tensor row_scale)",
    nm_compress_reference,
    _fake,
)

LIBRARY.impl("nm_compress", _nm_compress_cuda, "CUDA")
