"""Triton's values on NumPy: tensors, pointers into torch tensors, shared memory, TMA descriptors.

A tensor is logical, whatever its layout. Errors: an access outside of a torch tensor, an element
that is stored twice in a launch, an int32 that overflows.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from instructions import E4M3, from_bf16, to_bf16
from numpy_memory import Barrier, SharedMemory
from numpy_ptx import swizzled
from triton.experimental.gluon import language as real

ARRAYS = {
    "int1": np.bool_,
    "int8": np.int8,
    "int32": np.int32,
    "int64": np.int64,
    "fp16": np.float16,
    "bf16": np.float32,  # values that bf16 has
    "fp32": np.float32,
}
MEMORY = {
    torch.int8: (real.int8, np.int8),
    torch.int32: (real.int32, np.int32),
    torch.int64: (real.int64, np.int64),
    torch.float16: (real.float16, np.float16),
    torch.bfloat16: (real.bfloat16, np.uint16),
    torch.float32: (real.float32, np.float32),
    torch.float8_e4m3fn: (real.float8e4nv, np.uint8),
}


class Tensor:
    """A Triton tensor or run-time scalar."""

    def __init__(self, array: Any, dtype: real.dtype) -> None:
        self.array, self.dtype = np.asarray(array, ARRAYS[dtype.name]), dtype

    shape = property(lambda self: list(self.array.shape))
    type = property(lambda self: self)

    def to(self, dtype: real.dtype) -> Tensor:
        array = self.array
        if dtype.name == "bf16":
            array = from_bf16(to_bf16(array.astype(np.float32)))
        with np.errstate(over="ignore", invalid="ignore"):
            return Tensor(array.astype(ARRAYS[dtype.name]), dtype)

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.array[index], self.dtype)

    def __index__(self) -> int:
        return operator.index(self.array.item())

    def __bool__(self) -> bool:
        return bool(self.array)

    def __neg__(self) -> Tensor:
        return Tensor(-self.array, self.dtype)

    def reshape(self, *shape: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 else shape
        return Tensor(self.array.reshape([int(size) for size in sizes]), self.dtype)

    def permute(self, *order: Any) -> Tensor:
        return Tensor(self.array.transpose(order[0] if len(order) == 1 else order), self.dtype)

    def broadcast_to(self, *shape: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 else shape
        return Tensor(np.broadcast_to(self.array, [int(size) for size in sizes]), self.dtype)

    def split(self) -> tuple[Tensor, Tensor]:
        return self[..., 0], self[..., 1]


def tensor(value: Any, like: Tensor | None = None) -> Tensor:
    """Return ``value`` as a tensor; a Python number takes the type of ``like`` if it can."""
    if isinstance(value, Tensor):
        return value
    value = value.value if isinstance(value, real.constexpr) else value
    if isinstance(value, bool):
        return Tensor(value, real.int1)
    if isinstance(value, int):
        if like is not None and like.dtype.name != "int1":
            return Tensor(value, like.dtype)
        return Tensor(value, real.int32 if abs(value) < 1 << 31 else real.int64)
    floating = like is not None and like.dtype.is_floating()
    return Tensor(value, like.dtype if like is not None and floating else real.float32)


def common(left: Tensor, right: Tensor) -> real.dtype:
    order = ["int1", "int8", "int32", "int64", "fp16", "bf16", "fp32"]
    return max((left.dtype, right.dtype), key=lambda dtype: order.index(dtype.name))


def _result(array: np.ndarray, dtype: real.dtype) -> Tensor:
    if dtype.name == "int32" and (array.astype(np.int64) != array.astype(np.int32)).any():
        raise OverflowError("an int32 overflows in a kernel")
    return Tensor(array, dtype)


def _binary(name: str, compares: bool = False) -> Any:
    function = getattr(operator, name)

    def forward(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        other = tensor(other, self)
        dtype = common(self, other)
        wide = np.int64 if dtype.name in ("int8", "int32", "int64") else ARRAYS[dtype.name]
        with np.errstate(all="ignore"):
            array = function(self.array.astype(wide), other.array.astype(wide))
        return Tensor(array, real.int1) if compares else _result(array, dtype)

    return forward


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "and_", "or_", "xor", "rshift"):
    _forward = _binary(_name)
    setattr(Tensor, f"__{_name.strip('_')}__", _forward)
    setattr(Tensor, f"__r{_name.strip('_')}__", lambda a, b, f=_forward: f(tensor(b, a), a))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{_name}__", _binary(_name, compares=True))


# ---- global memory -------------------------------------------------------------------------------


class Memory:
    """The elements of a torch tensor, from its first to its last one."""

    def __init__(self, source: torch.Tensor) -> None:
        self.dtype, bits = MEMORY[source.dtype]
        span = sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True)) + 1
        flat = source.detach().as_strided((span if source.numel() else 0,), (1,))
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        self.array = flat.view(view[source.element_size()]).numpy().view(bits)
        self.stored = np.zeros(len(self.array), bool)

    def load(self, places: np.ndarray) -> np.ndarray:
        raw = self.array[places]
        if self.dtype.name == "bf16":
            return from_bf16(raw)
        return E4M3[raw] if self.dtype.name == "fp8e4nv" else raw

    def store(self, places: np.ndarray, values: np.ndarray) -> None:
        if self.stored[places].any() or len(np.unique(places)) != len(places):
            raise AssertionError("an element is stored twice")
        self.stored[places] = True
        self.array[places] = to_bf16(values) if self.dtype.name == "bf16" else values

    def check(self, places: np.ndarray) -> None:
        bad = places[(places < 0) | (places >= len(self.array))]
        if len(bad):
            raise IndexError(f"element {bad[0]} of {len(self.array)} is accessed")


class Pointer:
    """A pointer or a tensor of pointers: offsets into a memory."""

    def __init__(self, memory: Memory, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, np.asarray(offsets, np.int64)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + tensor(other).array.astype(np.int64))

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offsets[index])

    shape = property(lambda self: list(self.offsets.shape))

    def live(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return (places, mask), broadcast to each other; what is live is inside the memory."""
        live = np.True_ if mask is None else tensor(mask).array
        places, live = np.broadcast_arrays(self.offsets, live)
        self.memory.check(places[live])
        return places, live

    def load(self, mask: Any = None, other: Any = 0) -> Tensor:
        places, live = self.live(mask)
        dtype = self.memory.dtype
        fill = Tensor(np.broadcast_to(tensor(other).array, places.shape), tensor(other).dtype)
        result = fill.to(dtype).array.copy()
        result[live] = self.memory.load(places[live])
        return Tensor(result, dtype)


# ---- shared memory -------------------------------------------------------------------------------


class Shared:
    """A shared-memory descriptor: the address of every element, before swizzling."""

    def __init__(self, memory: SharedMemory, dtype: real.dtype, addresses: np.ndarray, width: int):
        self.memory, self.dtype, self.addresses, self.width = memory, dtype, addresses, width

    shape = property(lambda self: list(self.addresses.shape))

    def _view(self, addresses: np.ndarray) -> Shared:
        return Shared(self.memory, self.dtype, addresses, self.width)

    def index(self, i: Any) -> Shared:
        return self._view(self.addresses[int(i)])

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        if int(start) + length > self.shape[dim]:
            raise IndexError(f"slice {int(start)}..{int(start) + length} of {self.shape[dim]}")
        return self._view(self.addresses.take(np.arange(int(start), int(start) + length), dim))

    def permute(self, order: Any) -> Shared:
        return self._view(self.addresses.transpose(order))

    def bytes(self) -> np.ndarray:
        size = np.dtype(ARRAYS[self.dtype.name]).itemsize
        places = self.addresses[..., None] + np.arange(size)
        return swizzled(places, self.width) if self.width else places

    def load(self, layout: Any = None) -> Tensor:
        raw = self.memory.read(self.bytes())
        return Tensor(raw.view(ARRAYS[self.dtype.name])[..., 0], self.dtype)

    def store(self, value: Tensor) -> None:
        self.memory.write(self.bytes(), raw_bytes(value.array))

    def _keep_alive(self) -> None:
        pass


class Barriers:
    """An array of mbarriers in shared memory."""

    def __init__(self, memory: SharedMemory, count: int) -> None:
        self.barriers = [Barrier(memory) for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]

    def _keep_alive(self) -> None:
        pass


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes [..., itemsize] of an array."""
    return np.ascontiguousarray(array)[..., None].view(np.uint8)


class Tiles:
    """A TMA descriptor: boxes of a matrix, zero outside of it."""

    def __init__(self, descriptor: Any) -> None:
        base = descriptor.base
        self.memory, self.layout = Memory(base), descriptor.layout
        self.rows, self.columns = descriptor.shape
        self.stride, self.block = descriptor.strides[0], descriptor.block_shape
        self.block_shape, self.dtype = self.block, self.memory.dtype

    def box(self, row: int, column: int) -> np.ndarray:
        rows = row + np.arange(self.block[0])[:, None]
        columns = column + np.arange(self.block[1])
        live = (rows >= 0) & (rows < self.rows) & (columns >= 0) & (columns < self.columns)
        places = np.where(live, rows * self.stride + columns, 0)
        return np.where(live, self.memory.array[places], 0).astype(self.memory.array.dtype)
