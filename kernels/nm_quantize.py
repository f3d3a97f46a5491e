"""Keep the N best of every M channels of each token, as eight-bit codes with one scale a token.

    v          = x · smooth in fp32 at the channels that nm_select keeps, 0 · smooth elsewhere
    codes      = int8 or e4m3 of v / scale, as codes.py has it: the scale is that of the kept values
    row_scale  = scale · correction

    int8 codes · row_scale  ~  nm_select(x, factor, n, m, correction) · smooth

What is kept, and what a correction is, nm_select.py says: both look at x as it comes, not smoothed.
A correction scales the codes' scale, so that it costs nothing and is rounded to no 16 bits. Tokens
that nm_select copies unchanged, the first ``dense_prefix`` positions and all of fewer than
``min_tokens``, keep all channels and have correction 1; so do all tokens with n = m.

A token that keeps a NaN or an infinity (and one whose product with ``smooth`` has one, so every
token if ``smooth`` is not finite) has row_scale NaN and codes 0: any product with it is NaN, as it
would be without codes. A NaN or an infinity that is *not* kept, for lack of room or for its factor,
counts as any other dropped channel. Nobody looks whether ``smooth`` is finite and positive: that
would wait for the GPU. A token of zeros has the least scale and codes 0. float64 is scored and
corrected in float64, then quantised as float32.
"""

from __future__ import annotations

import ctypes

import torch

from amber_compile.kernels.arguments import check_codes, check_selection
from amber_compile.kernels.codes import CODES, quantized
from amber_compile.kernels.cpu_library import cpu_library, openmp_parallel
from amber_compile.kernels.cuda.device import why_no_triton
from amber_compile.kernels.nm_select import (
    address,
    correction_scale,
    nm_select_reference,
    tokens,
    tokens_of,
)
from amber_compile.kernels.registration import LIBRARY, define

Quantized = tuple[torch.Tensor, torch.Tensor]

# ---- reference -----------------------------------------------------------------------------------


def nm_quantize_reference(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str = "int8",
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> Quantized:
    """Select and quantise in plain tensor operations, on any device: the definition."""
    check_quantization(
        x, factor, smooth, n, m, dtype, correction, dense_prefix, min_tokens, offsets
    )
    kept = nm_select_reference(x, factor, n, m, None, dense_prefix, min_tokens, offsets)
    values = kept.float()
    codes, scale = quantized(values if smooth is None else values * smooth, dtype)
    if correction is not None:  # it is 1 where all is kept, for then both energies are the same
        scale = scale * correction_scale(x, kept, correction)[..., 0].float()
    return codes, scale


# ---- kernel --------------------------------------------------------------------------------------
#
# cpu/nm_quantize.cpp answers bit for bit like the reference; row_scale within rounding if there is
# a correction. It has int8 only: for fp8 the reference runs. It never flushes denormals, whatever
# torch.set_flush_denormal says. CUDA tensors have the Triton kernel of cuda/nm_quantize.py. float64
# has the reference only.

ENTRIES = {
    torch.float32: "nm_quantize_float32",
    torch.bfloat16: "nm_quantize_bfloat16",
    torch.float16: "nm_quantize_float16",
}


class Codes(ctypes.Structure):
    """``struct RowCodes`` of cpu/interface.h, line by line."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("smooth", "codes", "row_scale"))


def launch(
    library: ctypes.CDLL,
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    offsets: torch.Tensor | None = None,
) -> Quantized:
    """Run the C++ kernel on ``x`` [..., channels], not empty and of a type in ``ENTRIES``."""
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    row_scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    asked, _alive = tokens_of(x, factor, n, m, correction, dense_prefix, offsets)
    smooth = None if smooth is None else smooth.contiguous()
    answer = Codes(address(smooth), codes.data_ptr(), row_scale.data_ptr())
    getattr(library, ENTRIES[x.dtype])(ctypes.byref(asked), ctypes.byref(answer), openmp_parallel())
    return codes, row_scale


# ---- launch --------------------------------------------------------------------------------------


def _nm_quantize_cpu(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str = "int8",
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> Quantized:
    check_quantization(
        x, factor, smooth, n, m, dtype, correction, dense_prefix, min_tokens, offsets
    )
    library = cpu_library() if x.dtype in ENTRIES and dtype == "int8" else None
    if library is None or not x.numel():
        return nm_quantize_reference(
            x, factor, smooth, n, m, dtype, correction, dense_prefix, min_tokens, offsets
        )
    n = m if tokens(x) < min_tokens else n
    return launch(library, x, factor, smooth, n, m, correction, dense_prefix, offsets)


def _nm_quantize_cuda(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str = "int8",
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> Quantized:
    check_quantization(
        x, factor, smooth, n, m, dtype, correction, dense_prefix, min_tokens, offsets
    )
    if kernel_for(x, dtype) == "reference":
        return nm_quantize_reference(
            x, factor, smooth, n, m, dtype, correction, dense_prefix, min_tokens, offsets
        )
    from amber_compile.kernels.cuda.nm_quantize import launch  # needs Triton

    n = m if tokens(x) < min_tokens else n
    with torch.cuda.device(x.device):
        return launch(x, factor, smooth, n, m, dtype, correction, dense_prefix, offsets)


def kernel_for(x: torch.Tensor, dtype: str) -> str:
    """Name what quantises tensors like ``x``, for a report: C++, Triton or reference."""
    if x.dtype in ENTRIES:  # the Triton kernel has the same
        if x.device.type == "cpu" and dtype == "int8" and cpu_library() is not None:
            return "C++"
        if x.device.type == "cuda" and why_no_triton() is None:
            return "Triton"
    return "reference"


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str = "int8",
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> Quantized:
    check_quantization(
        x, factor, smooth, n, m, dtype, correction, dense_prefix, min_tokens, offsets
    )
    return empty_codes(x, dtype)


def empty_codes(x: torch.Tensor, dtype: str) -> Quantized:
    """Return codes and row_scale of ``x``, not written."""
    codes = torch.empty_like(x, dtype=CODES[dtype], memory_format=torch.contiguous_format)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def check_quantization(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str,
    correction: str | None,
    dense_prefix: int,
    min_tokens: int,
    offsets: torch.Tensor | None = None,
) -> None:
    """Raise ``OptionError`` unless ``x`` can be selected and quantised like that."""
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens, offsets)
    check_codes(x, smooth, dtype)


nm_quantize = define(
    "nm_quantize(Tensor x, Tensor? factor, Tensor? smooth, int n, int m, str dtype='int8', "
    "str? correction=None, int dense_prefix=0, int min_tokens=0, Tensor? offsets=None) "
    "-> (Tensor codes, Tensor row_scale)",
    nm_quantize_reference,
    _fake,
)

LIBRARY.impl("nm_quantize", _nm_quantize_cpu, "CPU")
LIBRARY.impl("nm_quantize", _nm_quantize_cuda, "CUDA")
