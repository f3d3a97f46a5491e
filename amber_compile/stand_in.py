"""What a weight holds whose values were released: NaN, in memory that all such weights share.

    weight.data = NaN of the same shape and strides, a view of one buffer as long as the largest

Shape, strides, type and device stay, so no compiled graph is guarded against it. Whoever multiplies
by such a weight all the same gets NaN. With a storage of no bytes, the other way to free one,
``clone``, ``copy_``, ``sum`` and ``load_state_dict`` end the process by a segmentation fault
(PyTorch 2.13, CPU). A storage is never resized: other tensors may be views of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import MutableMapping
from weakref import WeakValueDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

Kind = tuple[torch.dtype, torch.device, bool]
"""Whether it is an inference tensor comes last: what its views are given to becomes one."""

_lock = threading.Lock()
_buffers: WeakValueDictionary[Kind, torch.Tensor] = WeakValueDictionary()
_released: MutableMapping[torch.Tensor, torch.Tensor] = WeakIdKeyDictionary()
"""The buffer of each weight: it lives as long as the weight, so that its address stays its own."""


def empty(weight: torch.Tensor) -> None:
    """Give ``weight`` a stand-in for its values."""
    needed = 1 + sum(
        (size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True)
    )
    with _lock, torch.inference_mode(weight.is_inference()), torch.no_grad():
        buffer = _buffer(weight, needed)
        weight.data = buffer.as_strided(weight.shape, weight.stride())
        _released[weight] = buffer


def _buffer(weight: torch.Tensor, needed: int) -> torch.Tensor:
    """Return the largest buffer of the kind of ``weight``, a larger one if that is too small."""
    kind = weight.dtype, weight.device, weight.is_inference()
    buffer = _buffers.get(kind)
    if buffer is None or len(buffer) < needed:
        buffer = torch.full((needed,), math.nan, dtype=weight.dtype, device=weight.device)
        _buffers[kind] = buffer
    return buffer


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
