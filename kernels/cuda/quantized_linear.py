"""Dense products of 8-bit codes on a GPU: cuBLAS multiplies, and scales what it can.

    codes    product                                                       scales and bias
    int8     torch._int_mm: int32                                          rescale
    fp8      torch._scaled_mm, a scale for each row: bf16 at once          in the product
             torch._scaled_mm without scales: fp32                         rescale
             torch.mm of the codes as bf16, which holds each: fp32         rescale

    rescale  y = round(acc · row_scale · weight_scale + bias): one Triton kernel (rescale.py)

fp8 is multiplied as such since sm_89, before that as bf16. Its product scales for a bf16 result
without a bias or with one of bf16. cuBLAS takes int8 from 17 rows on with K and N in multiples of
8, fp8 in multiples of 16: what is missing is added as zeros, which copies an operand and changes no
result. A weight of such a shape is copied at each call; those of language models have none.

int8 answers bit for bit like the reference. fp8 sums are those of the tensor cores, which keep
fewer bits than fp32 (``use_fast_accum``, as wgmma.sp does), and ``_scaled_mm`` may apply its scales
in another order.

Without Triton, tensor operations rescale, in four passes instead of one.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from amber_compile.kernels.cuda.device import why_no_triton

LEAST_ROWS = 17  # of an int8 product
UNITS = {torch.int8: 8, torch.float8_e4m3fn: 16}
"""Of what K and N are multiples, and the rows of fp8."""
ALIGNMENT = 16  # bytes: where an operand may start


def launch(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute amber::quantized_linear, of ``codes`` [..., K] and a ``weight`` [N, K] not empty."""
    outputs, channels = weight.shape
    rows = codes.reshape(math.prod(codes.shape[:-1]), channels)
    scales = row_scale.reshape(len(rows)), weight_scale
    if why_rescaled(codes, weight, bias, dtype) is None:
        y = _scaled_product(rows, weight, *scales, bias)
    else:
        y = rescaled(_sums(rows, weight), *scales, bias, dtype)
    return y.view(*codes.shape[:-1], outputs)


def why_rescaled(
    codes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> str | None:
    """Return why the product does not scale its results itself, or None if it does."""
    if codes.dtype == torch.int8:
        return "an int8 product has no scales"
    if not multiplies_fp8(codes.device):
        return "there is no fp8 product on this device"
    if dtype != torch.bfloat16:
        return f"an fp8 product with a scale for each row has no result of {dtype}"
    if bias is not None and bias.dtype != torch.bfloat16:
        return f"an fp8 product has no bias of {bias.dtype}"
    if len(weight) % UNITS[weight.dtype]:
        return f"N = {len(weight)} is not a multiple of {UNITS[weight.dtype]}"
    return None


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether a device has fp8 products: tensor cores since sm_89, PyTorch's on a CPU."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


# ---- products ------------------------------------------------------------------------------------


def _scaled_product(
    codes: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    x, padded = _whole(codes, weight)
    row_scale = pad(row_scale, (0, len(x) - len(codes)))
    y = torch._scaled_mm(
        x,
        padded.t(),
        row_scale[:, None],
        weight_scale.contiguous()[None, :],
        None if bias is None else bias.contiguous(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y[: len(codes)]


def _sums(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return codes @ weightᵀ, int32 or fp32, with more rows and columns where cuBLAS wants them."""
    codes, weight = _whole(codes, weight)
    if codes.dtype == torch.int8:
        return torch._int_mm(codes, weight.t())
    if not multiplies_fp8(codes.device):
        return torch.mm(codes.bfloat16(), weight.t().bfloat16(), out_dtype=torch.float32)
    one = torch.ones((), device=codes.device)
    return torch._scaled_mm(
        codes, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=True
    )


def _whole(codes: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both operands as cuBLAS takes them, zeros added where something is missing."""
    unit, (tokens, channels) = UNITS[codes.dtype], codes.shape
    rows = max(tokens, LEAST_ROWS) if codes.dtype == torch.int8 else tokens + -tokens % unit
    return _padded(codes, rows, -channels % unit), _padded(
        weight, len(weight) + -len(weight) % unit, -channels % unit
    )


def _padded(codes: torch.Tensor, rows: int, missing: int) -> torch.Tensor:
    """Return ``codes`` with so many rows, and ``missing`` columns more; itself if it is whole."""
    if missing or rows != len(codes):
        integers = pad(codes.view(torch.int8), (0, missing, 0, rows - len(codes)))
        return integers.view(codes.dtype)
    whole = codes.is_contiguous() and codes.data_ptr() % ALIGNMENT == 0
    return codes if whole else codes.clone(memory_format=torch.contiguous_format)


# ---- scales and bias -----------------------------------------------------------------------------


def rescaled(
    acc: torch.Tensor,
    row_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return [tokens, outputs] of ``dtype`` for sums ``acc``, which may have more of either."""
    if acc.is_cuda and why_no_triton() is None:
        from amber_compile.kernels.cuda.rescale import launch as rescale  # needs Triton

        return rescale(acc, row_scale, weight_scale, bias, dtype)
    y = acc[: len(row_scale), : len(weight_scale)].float() * row_scale[:, None] * weight_scale
    return (y if bias is None else y + bias.float()).to(dtype)
