"""Quantise a weight: symmetric, a scale per output channel, once; and back.

    W'_nk = W_nk / smooth_k          scale_n = max(max_k |W'_nk| / limit, 2^-126)
    codes_nk = round(W'_nk / scale_n), at most ±limit          limit = 127 (int8) or 448 (e4m3)

in fp32, a slice of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .errors import OptionError
from .kernels.codes import CODES, quantized

SLICE = 1 << 22  # weights at a time


def quantize_weight(
    weight: torch.Tensor, dtype: str, smooth: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [N, K] of ``dtype`` and scales fp32 [N] of ``weight`` [N, K].

    ``smooth`` [K] is what the activations are multiplied by, and so what the weight is divided by.

    Raises:
        OptionError: if the weight is no floating-point matrix, or not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise OptionError(
            f"weight is {weight.dtype} {list(weight.shape)}; valid: floating point, "
            "[outputs, channels]"
        )
    codes = torch.empty(weight.shape, dtype=CODES[dtype], device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for some in _slices(weight):
        rows = weight[some].float()
        if smooth is not None:
            rows = rows / smooth
        codes[some], scale[some] = quantized(rows, dtype)
    if not scale.isfinite().all():
        row = int((~scale.isfinite()).nonzero()[0])
        raise OptionError(f"weight is not finite, first in output {row}; valid: finite weights")
    return codes, scale


def dequantize_weight(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    smooth: torch.Tensor | None = None,
) -> None:
    """Write codes · scale · smooth into ``weight`` [N, K], rounded once."""
    for some in _slices(codes):
        rows = codes[some].float() * scale[some, None]
        weight[some] = (rows if smooth is None else rows * smooth).to(weight.dtype)


def _slices(rows: torch.Tensor) -> Iterator[slice]:
    """Yield slices of rows that hold about ``SLICE`` elements."""
    step = max(1, SLICE // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
