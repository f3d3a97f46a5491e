"""Which kernel multiplies int8 codes on a CPU, and the way to it.

| kernel         | needs                                                   | AMBER_INT8_KERNEL |
|----------------|---------------------------------------------------------|-------------------|
| `AMX`          | AMX-INT8, and the system's permission to use its tiles  | `amx`             |
| `AVX-512 VNNI` | AVX-512 with VNNI                                       | `vnni`            |
| `C++`          | a compiler                                              | `cpp`             |
| `reference`    | nothing                                                 | `reference`       |

The first that this CPU has is used, ``AMBER_INT8_KERNEL`` asks for another. All give the same bits.
AMX is compared with plain C++ at its first use; if they differ, one warning says so and VNNI runs.
Its instructions multiply 16 tokens at a time, so up to 12 tokens are left to VNNI: a product that
small waits for memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from amber_compile.errors import OptionError, choices
from amber_compile.kernels.cpu_library import cpu_library, openmp_parallel

NUMBERS = {"C++": 0, "AVX-512 VNNI": 1, "AMX": 2}  # in int8_gemm.cpp
NAMES = {"amx": "AMX", "vnni": "AVX-512 VNNI", "cpp": "C++", "reference": "reference"}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PANEL = 32  # outputs
STEP = 64  # channels
SPARE_TOKENS = 31  # of which the last tile has room for
SINGLE_THREADED = 1 << 18  # products; with fewer, threads cost more than they bring


class _Weight(ctypes.Structure):
    """``struct Weight`` of cpu/interface.h, line by line."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "packed")),
        *((name, ctypes.c_int64) for name in ("outputs", "channels")),
        ("threads", ctypes.c_int32),
    )


class _Problem(ctypes.Structure):
    """``struct Problem`` of cpu/interface.h, line by line."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "row_scale", "weight", "weight_scale")),
        *((name, ctypes.c_void_p) for name in ("bias", "y", "scratch")),
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "outputs", "codes_stride")),
        *((name, ctypes.c_int32) for name in ("type", "kernel", "threads")),
    )


# ---- choice --------------------------------------------------------------------------------------


def int8_kernel() -> str:
    """Name what multiplies int8 codes on this CPU: AMX, AVX-512 VNNI, C++ or reference.

    Raises:
        OptionError: if AMBER_INT8_KERNEL asks for one that this CPU does not have.
    """
    return _choose(os.environ.get("AMBER_INT8_KERNEL", ""), cpu_library())


@functools.cache
def _choose(wanted: str, library: ctypes.CDLL | None) -> str:
    if wanted and wanted not in NAMES:
        raise OptionError(choices("AMBER_INT8_KERNEL", wanted, NAMES))
    able = available(library)
    if not wanted:
        return able[0]
    if NAMES[wanted] not in able:
        valid = ", ".join(name for name, kernel in NAMES.items() if kernel in able)
        raise OptionError(f"AMBER_INT8_KERNEL={wanted!r} is not on this CPU; valid here: {valid}")
    return NAMES[wanted]


def available(library: ctypes.CDLL | None) -> list[str]:
    """Return the kernels that this CPU has, the fastest first."""
    if library is None:
        return ["reference"]
    able = [name for name, number in NUMBERS.items() if library.int8_has(number)]
    if "AMX" in able and (wrong := _why_wrong(library)):
        warnings.warn(f"Amber does without AMX: {wrong}", stacklevel=5)
        able.remove("AMX")
    return [*reversed(able), "reference"]


def _why_wrong(library: ctypes.CDLL) -> str | None:
    """Return what AMX gets wrong of a small product, with all its ragged edges, or None."""
    with unset_fake_temporarily(), torch.no_grad():
        codes, weight = _codes(45, 203), _codes(75, 203)
        packed = pack(library, weight)
        ones = (torch.ones(45), torch.ones(75))
        y, plain = (
            multiply(library, kernel, codes, ones[0], packed, ones[1], None, torch.float32)
            for kernel in ("AMX", "C++")
        )
        wrong = int((y != plain).sum())
    return f"its product is wrong at {wrong} of {y.numel()}" if wrong else None


def _codes(rows: int, channels: int) -> torch.Tensor:
    """Return codes of all sizes, without a random number of the process."""
    numbers = torch.arange(rows * channels, device="cpu", dtype=torch.int64)
    return ((numbers * 7919 + numbers // 255) % 255 - 127).to(torch.int8).view(rows, channels)


# ---- C++ -----------------------------------------------------------------------------------------


def packed_shape(outputs: int, channels: int) -> tuple[int, int]:
    """Return the shape of a packed weight: panels, and the bytes of one (int8_gemm.cpp)."""
    return -(-outputs // PANEL), PANEL * (-(-channels // STEP) * STEP + 4)


def pack(library: ctypes.CDLL, codes: torch.Tensor) -> torch.Tensor:
    """Return int8 codes [N, K] in the order in which the kernels read them."""
    codes = codes.contiguous()
    packed = codes.new_empty(packed_shape(*codes.shape))
    weight = _Weight(codes.data_ptr(), packed.data_ptr(), *codes.shape, torch.get_num_threads())
    library.int8_pack(ctypes.byref(weight), openmp_parallel())
    return packed


def multiply(
    library: ctypes.CDLL,
    kernel: str,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply codes [T, K], channels side by side, with a packed weight: [T, N].

    No size is 0; scales and bias are fp32 and contiguous.
    """
    tokens, channels = codes.shape
    outputs = weight_scale.shape[0]
    y = codes.new_empty((tokens, outputs), dtype=dtype)
    scratch = codes.new_empty((tokens + SPARE_TOKENS) * -(-channels // STEP) * STEP)
    small = tokens * channels * outputs < SINGLE_THREADED
    problem = _Problem(
        *(codes.data_ptr(), row_scale.data_ptr(), packed.data_ptr(), weight_scale.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), scratch.data_ptr()),
        *(tokens, channels, outputs, codes.stride(0)),
        *(TYPES[dtype], NUMBERS[kernel], 1 if small else torch.get_num_threads()),
    )
    library.int8_linear(ctypes.byref(problem), openmp_parallel())
    return y
