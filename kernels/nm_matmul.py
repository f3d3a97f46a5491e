"""Multiply rows compressed 2:4 with the weight of a projection.

    acc = expand(values, metadata) @ weightᵀ             [T, N]: int32 for int8 operands, else fp32
    y   = round(acc · row_scale[:, None] · col_scale[None, :] + bias)

The second line is fp32, in this order, and rounds once to the dtype of y; a scale or bias that is
None is left out. ``values`` and ``metadata`` are those of nm_compress, see two_four.py:

    values     [T, K/2]                     bf16, fp16, int8 or fp8 (e4m3); K a multiple of 64
    metadata   [ceil(T/16), K/64, 32]       int32
    weight     [N, K]                       of the dtype of values; N a multiple of 8
    bias       [N]                          fp32 or the dtype of y
    row_scale  [T]                          fp32: one of each token
    col_scale  [N]                          fp32: one of each output
    y          [T, N]                       bf16, fp16 or fp32; None: that of values, bf16 of 8 bits

On CUDA this is one kernel: wgmma.sp on sm_90, mma.sp on the others that have it (cuda/device.py).
Where neither can run the reference does, the rows expanded and then a dense product, and a warning
says why.
"""

from __future__ import annotations

import functools
import warnings
from importlib import import_module
from typing import Any

import torch

from amber_compile.errors import OptionError
from amber_compile.kernels.arguments import differ
from amber_compile.kernels.cuda.device import KINDS, device_instruction, why_no_sparse_product
from amber_compile.kernels.registration import LIBRARY, define
from amber_compile.kernels.two_four import TILE_COLUMNS, expand, tile_count

RESULTS = (torch.bfloat16, torch.float16, torch.float32)
OUTPUTS = 8  # N is a multiple: 16 bytes of results, one instruction's columns

# ---- reference -----------------------------------------------------------------------------------


def nm_matmul_reference(
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiply in plain tensor operations, on any device: the definition of the operator."""
    check_product(values, metadata, weight, bias, row_scale, col_scale, out_dtype)
    # sums of int8 products are whole numbers that fp64 holds exactly, as int32 does
    precision = torch.float64 if values.dtype == torch.int8 else torch.float32
    y = (expand(values, metadata).to(precision) @ weight.to(precision).T).float()
    if row_scale is not None:
        y = y * row_scale[:, None]
    if col_scale is not None:
        y = y * col_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(result_dtype(values, out_dtype))


def result_dtype(values: torch.Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the product."""
    if out_dtype is not None:
        return out_dtype
    return values.dtype if values.dtype.itemsize == 2 else torch.bfloat16


# ---- launch --------------------------------------------------------------------------------------


def why_reference(
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Return why no sparse kernel multiplies these CUDA tensors, or None if one does."""
    if reason := why_no_sparse_product(values.device, KINDS[values.dtype]):
        return reason
    kernel = sparse_kernel(values.device)
    refusal: str | None = kernel.why_not(
        values, metadata, weight, bias, row_scale, col_scale, out_dtype
    )
    return refusal


def sparse_kernel(device: torch.device) -> Any:
    """Return the module of the kernel for a device that has a sparse instruction."""
    instruction = device_instruction(device)
    assert instruction is not None, "why_no_sparse_product has found one"
    return import_module(f"amber_compile.kernels.cuda.{instruction.module}")


@functools.cache
def _tell(reason: str) -> None:
    """Say once that a product is computed the slow way."""
    warnings.warn(f"amber: nm_matmul runs its slow reference: {reason}", stacklevel=4)


def _nm_matmul_cuda(
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    check_product(values, metadata, weight, bias, row_scale, col_scale, out_dtype)
    arguments = (values, metadata, weight, bias, row_scale, col_scale, out_dtype)
    if reason := why_reference(*arguments):
        _tell(reason)
        return nm_matmul_reference(*arguments)
    with torch.cuda.device(values.device):
        y: torch.Tensor = sparse_kernel(values.device).launch(*arguments)
    return y


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    check_product(values, metadata, weight, bias, row_scale, col_scale, out_dtype)
    shape = [values.shape[0], weight.shape[0]]
    return values.new_empty(shape, dtype=result_dtype(values, out_dtype))


def check_product(
    values: torch.Tensor,
    metadata: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    col_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ``OptionError`` unless the product is defined.

    As in arguments.py a rule about a symbolic size is left to run time.
    """
    _check_operands(values, metadata, weight)
    dtype = result_dtype(values, out_dtype)
    if dtype not in RESULTS:
        raise OptionError(f"out_dtype={dtype}; valid: {', '.join(map(str, RESULTS))}")
    tokens, outputs = values.shape[0], weight.shape[0]
    for name, vector, size, dtypes in (
        ("bias", bias, outputs, (dtype, torch.float32)),
        ("row_scale", row_scale, tokens, (torch.float32,)),
        ("col_scale", col_scale, outputs, (torch.float32,)),
    ):
        if vector is None:
            continue
        if vector.dtype not in dtypes:
            valid = ", ".join(map(str, dict.fromkeys(dtypes)))
            raise OptionError(f"{name} has dtype {vector.dtype}; valid: {valid}")
        if vector.dim() != 1 or differ(vector.shape[0], size):
            raise OptionError(f"{name} has shape {list(vector.shape)}; valid: [{size}]")
        _check_device(name, vector, values)


def _check_operands(values: torch.Tensor, metadata: torch.Tensor, weight: torch.Tensor) -> None:
    if values.dtype not in KINDS:
        raise OptionError(f"values have dtype {values.dtype}; valid: {', '.join(map(str, KINDS))}")
    if values.dim() != 2 or not _multiple(values.shape[1], TILE_COLUMNS // 2):
        raise OptionError(
            f"values have shape {list(values.shape)}; valid: [T, K/2], K a multiple of "
            f"{TILE_COLUMNS}"
        )
    tokens, columns = values.shape[0], 2 * values.shape[1]
    if weight.dtype != values.dtype:
        raise OptionError(f"weight has dtype {weight.dtype}; valid: that of values, {values.dtype}")
    fits = weight.dim() == 2 and _multiple(weight.shape[0], OUTPUTS)
    if not fits or differ(weight.shape[1], columns):
        raise OptionError(
            f"weight has shape {list(weight.shape)}; valid: [N, {columns}], N a multiple of "
            f"{OUTPUTS}"
        )
    expected = (tile_count(tokens), columns // TILE_COLUMNS, 32)
    wrong = metadata.dim() != 3 or any(map(differ, metadata.shape, expected))
    if metadata.dtype != torch.int32 or wrong:
        raise OptionError(
            f"metadata is {metadata.dtype} {list(metadata.shape)}; valid: torch.int32 "
            f"{list(expected)}"
        )
    _check_device("metadata", metadata, values)
    _check_device("weight", weight, values)


def _multiple(size: int | torch.SymInt, unit: int) -> bool:
    """Return whether a size is a multiple of ``unit``, as far as is known."""
    return not isinstance(size, int) or size % unit == 0


def _check_device(name: str, tensor: torch.Tensor, values: torch.Tensor) -> None:
    if tensor.device != values.device:
        raise OptionError(
            f"{name} is on {tensor.device}; valid: the device of values, {values.device}"
        )


nm_matmul = define(
    "nm_matmul(Tensor values, Tensor metadata, Tensor weight, Tensor? bias=None, "
    "Tensor? row_scale=None, Tensor? col_scale=None, ScalarType? out_dtype=None) -> Tensor",
    nm_matmul_reference,
    _fake,
)

LIBRARY.impl("nm_matmul", _nm_matmul_cuda, "CUDA")
