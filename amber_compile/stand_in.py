"""What a weight holds whose values were released: NaN, in memory that all such weights share.

    weight.data = NaN of the same shape and strides, a view of one buffer as long as the largest

Shape, strides, type and device stay, so no compiled graph is guarded against it. Whoever multiplies
by such a weight all the same gets NaN. It is a signalling NaN, which arithmetic makes a quiet one:
an adapter that is merged into a released weight (``weight.data += delta``) leaves a trace. With a
storage of no bytes, the other way to free one, ``clone``, ``copy_``, ``sum`` and
``load_state_dict`` end the process by a segmentation fault (PyTorch 2.13, CPU). A storage is never
resized: other tensors may be views of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import MutableMapping
from weakref import WeakValueDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .locking import lock

Kind = tuple[torch.dtype, torch.device, bool]
"""Whether it is an inference tensor comes last: what its views are given to becomes one."""

_buffers: WeakValueDictionary[Kind, torch.Tensor] = WeakValueDictionary()
_released: MutableMapping[torch.Tensor, torch.Tensor] = WeakIdKeyDictionary()
"""The buffer of each weight: it lives as long as the weight, so that its address stays its own."""


def empty(weight: torch.Tensor) -> None:
    """Give ``weight`` a stand-in for its values."""
    needed = 1 + sum(
        (size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True)
    )
    with lock, torch.inference_mode(weight.is_inference()), torch.no_grad():
        buffer = _buffer(weight, needed)
        weight.data = buffer.as_strided(weight.shape, weight.stride())
        _released[weight] = buffer


def _buffer(weight: torch.Tensor, needed: int) -> torch.Tensor:
    """Return the largest buffer of the kind of ``weight``, a larger one if that is too small."""
    kind = weight.dtype, weight.device, weight.is_inference()
    buffer = _buffers.get(kind)
    if buffer is None or len(buffer) < needed:
        bits = _signalling_nan(weight.dtype)
        buffer = bits.to(weight.device).repeat(needed).view(weight.dtype)
        _buffers[kind] = buffer
    return buffer


def _signalling_nan(dtype: torch.dtype) -> torch.Tensor:
    """Return the bits of a NaN whose first bit of the mantissa, the quiet one, is not set."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    quiet = torch.tensor([math.nan], dtype=dtype).view(integers)
    mantissa = round(-math.log2(torch.finfo(dtype).eps))
    return quiet ^ (3 << (mantissa - 2))


def trim() -> None:
    """Give free memory back to the system: glibc keeps what lies between blocks in use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def is_released(weight: torch.Tensor) -> bool:
    """Whether ``weight`` holds a stand-in: not if it was given other data since."""
    buffer = _released.get(weight)
    return buffer is not None and weight.data_ptr() == buffer.data_ptr()


def released(model: torch.nn.Module) -> list[str]:
    """Return the qualified names of the parameters of ``model`` whose values were released."""
    return [name for name, weight in model.named_parameters() if is_released(weight)]
