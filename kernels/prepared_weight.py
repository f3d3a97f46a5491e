"""Codes of a weight, in the layout that the product of their device reads.

    prepare_weight(codes [N, K])                  the prepared weight
    prepared_like(n, k, dtype, device)            an empty one
    unprepare(prepared, n, k)                     the codes [N, K] again

int8 on a CPU with C++ kernels is packed, [ceil(N/32), 32 (K' + 4)] with K' the next multiple of 64:
panels of 32 outputs, see cpu/int8_gemm.cpp. All others stay [N, K]. The two shapes never agree, so
a prepared weight tells by its shape what it is. fp8 stays as it is on a CPU.
"""

from __future__ import annotations

import torch

from amber_compile.errors import OptionError, choices
from amber_compile.kernels.codes import CODES
from amber_compile.kernels.cpu_library import cpu_library
from amber_compile.kernels.int8_kernel import PANEL, int8_kernel, pack, packed_shape


def prepare_weight(codes: torch.Tensor) -> torch.Tensor:
    """Return the codes [N, K], int8 or fp8 (e4m3), prepared for the device they are on.

    Raises:
        OptionError: if they are something else.
    """
    if codes.dtype not in CODES.values() or codes.dim() != 2:
        valid = ", ".join(map(str, CODES.values()))
        raise OptionError(f"codes are {codes.dtype} {list(codes.shape)}; valid: {valid}, [N, K]")
    if not is_packed(codes.dtype, codes.device):
        return codes.contiguous()
    library = cpu_library()
    assert library is not None, "without it nothing is packed"
    return pack(library, codes)


def prepared_like(n: int, k: int, dtype: str, device: torch.device) -> torch.Tensor:
    """Return an empty prepared weight for [n, k] codes of ``dtype``, "int8" or "fp8".

    Raises:
        OptionError: for another dtype.
    """
    if dtype not in CODES:
        raise OptionError(choices("dtype", dtype, CODES))
    shape = prepared_shape(n, k, CODES[dtype], device)
    return torch.empty(shape, dtype=CODES[dtype], device=device)


def prepared_shape(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Return the shape of a prepared weight."""
    return packed_shape(n, k) if is_packed(dtype, device) else (n, k)


def is_packed(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether codes of ``dtype`` are packed on ``device``."""
    return dtype == torch.int8 and device.type == "cpu" and int8_kernel() != "reference"


def unprepare(prepared: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the codes [n, k] that ``prepared`` was made of: a view if it is not packed."""
    if prepared.shape == (n, k):
        return prepared
    if prepared.shape != packed_shape(n, k):
        valid = f"[{n}, {k}] or {list(packed_shape(n, k))}"
        raise OptionError(f"prepared has shape {list(prepared.shape)}; valid: {valid}")
    panels, fours = prepared.shape[0], prepared.shape[1] // (4 * PANEL) - 1
    codes = prepared[:, : -4 * PANEL]  # behind them lie 4 bytes for each output
    by_output = codes.reshape(panels, fours, PANEL, 4).transpose(1, 2)
    return by_output.reshape(panels * PANEL, fours * 4)[:n, :k]
