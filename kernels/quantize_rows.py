"""Quantise each token to eight-bit codes with one scale.

    v                = x · smooth in fp32
    codes, row_scale = int8 or e4m3 of v, and their scale, as codes.py has them

which is nm_quantize with all channels kept, on the CPU by the same kernel. What is said there of
NaN, infinities, zeros and ``smooth`` holds here.
"""

from __future__ import annotations

import torch

from amber_compile.kernels.arguments import check_codes
from amber_compile.kernels.codes import quantized
from amber_compile.kernels.cpu_library import cpu_library
from amber_compile.kernels.nm_quantize import (
    ENTRIES,
    Quantized,
    empty_codes,
    kernel_for,
    launch,
)
from amber_compile.kernels.registration import LIBRARY, define

# ---- reference -----------------------------------------------------------------------------------


def quantize_rows_reference(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: str = "int8"
) -> Quantized:
    """Quantise in plain tensor operations, on any device: the definition of the operator."""
    check_codes(x, smooth, dtype)
    values = x.float()
    return quantized(values if smooth is None else values * smooth, dtype)


# ---- launch --------------------------------------------------------------------------------------


def _quantize_rows_cpu(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: str = "int8"
) -> Quantized:
    check_codes(x, smooth, dtype)
    library = cpu_library() if x.dtype in ENTRIES and dtype == "int8" else None
    if library is None or not x.numel():
        return quantize_rows_reference(x, smooth, dtype)
    return launch(library, x, None, smooth, 1, 1)


def _quantize_rows_cuda(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: str = "int8"
) -> Quantized:
    check_codes(x, smooth, dtype)
    if kernel_for(x, dtype) == "reference":
        return quantize_rows_reference(x, smooth, dtype)
    from amber_compile.kernels.cuda.nm_quantize import launch  # needs Triton

    with torch.cuda.device(x.device):
        return launch(x, None, smooth, 1, 1, dtype)


# ---- operator ------------------------------------------------------------------------------------


def _fake(x: torch.Tensor, smooth: torch.Tensor | None, dtype: str = "int8") -> Quantized:
    check_codes(x, smooth, dtype)
    return empty_codes(x, dtype)


quantize_rows = define(
    "quantize_rows(Tensor x, Tensor? smooth, str dtype='int8') -> (Tensor codes, Tensor row_scale)",
    quantize_rows_reference,
    _fake,
)

LIBRARY.impl("quantize_rows", _quantize_rows_cpu, "CPU")
LIBRARY.impl("quantize_rows", _quantize_rows_cuda, "CUDA")
