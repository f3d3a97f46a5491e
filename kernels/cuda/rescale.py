"""Scale the sums of a quantised product, add its bias and round: one pass, in Triton.

    y = round(acc · row_scale[:, None] · weight_scale[None, :] + bias)

in fp32, in this order, without fused multiply-adds: bit for bit like tensor operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# ---- kernel --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def rescale_kernel(
    acc_ptr, row_scale_ptr,             # [tokens, outputs] of int32 or fp32, [tokens]
    weight_scale_ptr, bias_ptr,         # [outputs], [outputs] or None
    y_ptr,                              # [tokens, outputs], contiguous
    tokens, outputs, acc_stride,        # the stride of rows
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # of a program
):  # fmt: skip
    blocks = (outputs + COLUMNS - 1) // COLUMNS
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    live = (rows < tokens)[:, None] & (columns < outputs)[None, :]
    acc = tl.load(acc_ptr + rows[:, None] * acc_stride + columns[None, :], mask=live, other=0)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < tokens, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + columns, mask=columns < outputs, other=0.0)
    y = acc.to(tl.float32) * row_scale[:, None] * weight_scale[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < outputs, other=0.0)
        y = y + bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * outputs + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=live)


# ---- launch --------------------------------------------------------------------------------------

SHAPE = {"ROWS": 8, "COLUMNS": 512}  # 32 results a thread
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def launch(
    acc: torch.Tensor,
    row_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return [tokens, outputs] of ``dtype`` for sums ``acc``, which may have more of either."""
    tokens, outputs = len(row_scale), len(weight_scale)
    y = torch.empty(tokens, outputs, dtype=dtype, device=acc.device)
    programs = triton.cdiv(tokens, SHAPE["ROWS"]) * triton.cdiv(outputs, SHAPE["COLUMNS"])
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    vectors = (None if v is None else v.contiguous() for v in (row_scale, weight_scale, bias))
    rescale_kernel[(programs,)](
        *(acc, *vectors, y), *(tokens, outputs, acc.stride(0)), **SHAPE, **OPTIONS
    )
    return y
