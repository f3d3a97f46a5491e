"""Multiply quantised activations with a quantised weight.

    acc = codes @ weight_codesᵀ                           [..., N]: int32 for int8, fp32 for fp8
    y   = round(acc · row_scale[..., None] · weight_scale + bias)

The second line is fp32, in this order, and rounds once, to ``dtype``; the bias may be None.

    codes         [..., K]        int8, or fp8 (e4m3), as quantize_rows makes them
    row_scale     [...]           fp32: one of each token; NaN makes the token's results NaN
    weight                        prepare_weight(codes [N, K]) of prepared_weight.py
    weight_scale  [N]             fp32: one of each output
    bias          [N]             any floating type
    y             [..., N]        bf16, fp16 or fp32

K is at most 131072: 128 · 127 · K is then below 2^31, so int32 holds every sum of codes of which
one is within ±127, as those of weights are, and whatever order they are added in. On the way sums
may wrap modulo 2^32, which the final sum does not see.

On a CPU int8 is one C++ kernel with the scales, the bias and the rounding in its epilogue
(int8_kernel.py says which); its answer is that of the reference, bit for bit but for the bits of
a NaN. fp8 is emulated there: its codes are multiplied in fp32, a slice of the weight at a time,
for what it costs in accuracy and not for speed. On CUDA cuBLAS multiplies, see
cuda/quantized_linear.py.
"""

from __future__ import annotations

import math

import torch

from amber_compile.errors import OptionError
from amber_compile.kernels.arguments import differ
from amber_compile.kernels.codes import CODES
from amber_compile.kernels.cpu_library import cpu_library
from amber_compile.kernels.int8_kernel import int8_kernel, multiply
from amber_compile.kernels.prepared_weight import (
    prepare_weight,
    prepared_like,
    prepared_shape,
    unprepare,
)
from amber_compile.kernels.registration import LIBRARY, define

__all__ = ["prepare_weight", "prepared_like", "quantized_linear", "unprepare"]

RESULTS = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_K = 1 << 17
SLICE = 1 << 24  # codes of a weight that are widened at a time

# ---- reference -----------------------------------------------------------------------------------


def quantized_linear_reference(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply in plain tensor operations, on any device: the definition of the operator."""
    check_product(codes, row_scale, weight, weight_scale, bias, dtype)
    rows = unprepare(weight, weight_scale.shape[0], codes.shape[-1])
    y = _sums(codes, rows) * row_scale[..., None] * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def _sums(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return codes @ weightᵀ in fp32; whole numbers are summed in fp64, so exactly."""
    precision = torch.float64 if codes.dtype == torch.int8 else torch.float32
    wide = codes.to(precision)
    y = wide.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)
    rows = max(1, SLICE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        y[..., part] = wide @ weight[part].to(precision).T
    return y


# ---- launch --------------------------------------------------------------------------------------


def _quantized_linear_cpu(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_product(codes, row_scale, weight, weight_scale, bias, dtype)
    kernel, library = kernel_for(codes), cpu_library()
    outputs, channels = weight_scale.shape[0], codes.shape[-1]
    if kernel == "reference" or library is None or not (codes.numel() and outputs):
        return quantized_linear_reference(codes, row_scale, weight, weight_scale, bias, dtype)
    rows = codes.reshape(math.prod(codes.shape[:-1]), channels)
    y = multiply(
        library,
        kernel,
        rows if rows.stride(1) == 1 else rows.contiguous(),
        row_scale.contiguous(),
        weight.contiguous(),
        weight_scale.contiguous(),
        None if bias is None else bias.float().contiguous(),
        dtype,
    )
    return y.view(*codes.shape[:-1], outputs)


def _quantized_linear_cuda(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_product(codes, row_scale, weight, weight_scale, bias, dtype)
    operands = codes, row_scale, weight, weight_scale, bias, dtype
    if not (codes.numel() and weight.numel()):
        return quantized_linear_reference(*operands)
    from amber_compile.kernels.cuda.quantized_linear import launch

    with torch.cuda.device(codes.device):
        return launch(*operands)


def kernel_for(codes: torch.Tensor) -> str:
    """Name what multiplies ``codes``, for a report."""
    if codes.device.type == "cuda":
        return "cuBLAS"
    if codes.device.type == "cpu" and codes.dtype == torch.int8:
        return int8_kernel()
    return "reference"


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_product(codes, row_scale, weight, weight_scale, bias, dtype)
    return codes.new_empty((*codes.shape[:-1], weight_scale.shape[0]), dtype=dtype)


def check_product(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise ``OptionError`` unless the product is defined.

    As in arguments.py a rule about a symbolic size is left to run time.
    """
    if dtype not in RESULTS:
        raise OptionError(f"dtype={dtype}; valid: {', '.join(map(str, RESULTS))}")
    _check_codes(codes)
    if weight_scale.dim() != 1:
        raise OptionError(f"weight_scale has shape {list(weight_scale.shape)}; valid: [N]")
    for name, vector, shape in (
        ("row_scale", row_scale, codes.shape[:-1]),
        ("weight_scale", weight_scale, weight_scale.shape),
        ("bias", bias, weight_scale.shape),
    ):
        if vector is not None:
            _check_vector(name, vector, shape, codes.device)
    _check_weight(codes, weight, weight_scale.shape[0])


def _check_codes(codes: torch.Tensor) -> None:
    if codes.dtype not in CODES.values() or not codes.dim():
        valid = ", ".join(map(str, CODES.values()))
        raise OptionError(f"codes are {codes.dtype} {list(codes.shape)}; valid: {valid}, [..., K]")
    channels = codes.shape[-1]
    if codes.dtype == torch.int8 and isinstance(channels, int) and channels > LARGEST_K:
        raise OptionError(f"codes have {channels} channels; valid: up to {LARGEST_K}")


def _check_vector(name: str, vector: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    if name == "bias" and not vector.is_floating_point():
        raise OptionError(f"bias has dtype {vector.dtype}; valid: a floating type")
    if name != "bias" and vector.dtype != torch.float32:
        raise OptionError(f"{name} has dtype {vector.dtype}; valid: torch.float32")
    if vector.dim() != len(shape) or any(map(differ, vector.shape, shape)):
        raise OptionError(f"{name} has shape {list(vector.shape)}; valid: {list(shape)}")
    _check_device(name, vector, device)


def _check_weight(codes: torch.Tensor, weight: torch.Tensor, outputs: int) -> None:
    if weight.dtype != codes.dtype:
        raise OptionError(f"weight has dtype {weight.dtype}; valid: that of codes, {codes.dtype}")
    _check_device("weight", weight, codes.device)
    channels = codes.shape[-1]
    shape = prepared_shape(outputs, channels, weight.dtype, weight.device)
    if weight.dim() != 2 or any(map(differ, weight.shape, shape)):
        raise OptionError(
            f"weight has shape {list(weight.shape)}; valid: {list(shape)}, which prepare_weight "
            f"makes of [{outputs}, {channels}] codes"
        )


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise OptionError(f"{name} is on {tensor.device}; valid: the device of codes, {device}")


quantized_linear = define(
    "quantized_linear(Tensor codes, Tensor row_scale, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    quantized_linear_reference,
    _fake,
)

LIBRARY.impl("quantized_linear", _quantized_linear_cpu, "CPU")
LIBRARY.impl("quantized_linear", _quantized_linear_cuda, "CUDA")
