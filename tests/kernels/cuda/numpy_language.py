"""Gluon's language on NumPy: what the kernels that numpy_gluon.py runs call ``gl``, ``tma``, ...

Whatever a kernel uses beyond this raises ``NotImplementedError`` with its name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy_memory import Barrier, SharedMemory
from numpy_ptx import run_asm
from numpy_tensor import (
    ARRAYS,
    Barriers,
    Pointer,
    Shared,
    Tensor,
    Tiles,
    common,
    raw_bytes,
    tensor,
)
from triton.experimental.gluon import language as real
from triton.experimental.gluon.language.nvidia import hopper


class Language:
    """What a kernel calls ``gl``: types and layouts are Triton's, the rest is written here."""

    def __init__(self, memory: SharedMemory, program: int, programs: int) -> None:
        self.memory, self.program, self.programs = memory, program, programs

    def __getattr__(self, name: str) -> Any:
        found = getattr(real, name)
        if isinstance(found, real.dtype) or name.endswith("Layout") or name == "constexpr":
            return found
        raise NotImplementedError(f"gl.{name}")

    static_range = staticmethod(range)

    def program_id(self, axis: int) -> Tensor:
        return Tensor(self.program if axis == 0 else 0, real.int32)

    def num_programs(self, axis: int) -> Tensor:
        return Tensor(self.programs if axis == 0 else 1, real.int32)

    def static_assert(self, condition: Any, message: str = "") -> None:
        assert condition, message

    def assume(self, condition: Any) -> None:
        assert condition, "gl.assume"

    def multiple_of(self, value: Any, factors: Any) -> Any:
        return value

    max_contiguous = max_constancy = multiple_of

    def arange(self, start: int, end: int, layout: Any = None) -> Tensor:
        if (end - start) & (end - start - 1):
            raise AssertionError(f"arange of {end - start}: not a power of two")
        return Tensor(np.arange(start, end), real.int32)

    def full(self, shape: Any, value: Any, dtype: real.dtype, layout: Any = None) -> Tensor:
        return Tensor(np.full([int(n) for n in shape], tensor(value).array), dtype)

    def zeros(self, shape: Any, dtype: real.dtype, layout: Any = None) -> Tensor:
        return self.full(shape, 0, dtype)

    def cdiv(self, a: Any, b: Any) -> Any:
        return (a + b - 1) // b

    def minimum(self, a: Any, b: Any) -> Tensor:
        left, right = _alike(a, b)
        return Tensor(np.minimum(left.array, right.array), common(left, right))

    def maximum(self, a: Any, b: Any) -> Tensor:
        left, right = _alike(a, b)
        return Tensor(np.maximum(left.array, right.array), common(left, right))

    def where(self, condition: Tensor, a: Any, b: Any) -> Tensor:
        left, right = _alike(a, b)
        chosen = np.where(condition.array, left.array, right.array)
        return Tensor(chosen, common(left, right))

    def reshape(self, x: Tensor, shape: Any) -> Tensor:
        return x.reshape(shape)

    def permute(self, x: Tensor, order: Any) -> Tensor:
        return x.permute(order)

    def expand_dims(self, x: Tensor, axis: int) -> Tensor:
        return Tensor(np.expand_dims(x.array, axis), x.dtype)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.split()

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return Tensor(np.stack([a.array, b.array], -1), a.dtype)

    def convert_layout(self, x: Any, layout: Any, assert_trivial: bool = False) -> Any:
        return x

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Tensor:
        return pointer.load(mask, 0 if other is None else other)

    def store(self, pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
        places, live = pointer.live(mask)
        values = tensor(value).to(pointer.memory.dtype).array
        pointer.memory.store(places[live], np.broadcast_to(values, places.shape)[live])

    def allocate_shared_memory(self, dtype: real.dtype, shape: Any, layout: Any) -> Any:
        shape = [int(n) for n in shape]
        if isinstance(layout, hopper.mbarrier.MBarrierLayout):
            self.memory.allocate(8 * shape[0], 8)
            return Barriers(self.memory, shape[0])
        size = np.dtype(ARRAYS[dtype.name]).itemsize
        width = getattr(layout, "swizzle_byte_width", 0)
        if width and shape[-1] * size != width:
            raise NotImplementedError(f"rows of {shape[-1] * size} bytes, swizzled in {width}")
        total = int(np.prod(shape)) * size
        start = self.memory.allocate(total, 1024)
        addresses = start + size * np.arange(total // size).reshape(shape)
        return Shared(self.memory, dtype, addresses, width)

    def barrier(self) -> None:
        self.memory.barrier()

    thread_barrier = barrier

    def warp_specialize(self, partitions: Any, warps: Any, registers: Any = None) -> None:
        self.memory.run([lambda f=f, a=a: f(*a) for f, a in partitions])

    def inline_asm_elementwise(
        self, asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int
    ) -> Tensor:
        """Run ``asm`` once for all threads: the last dimension of the arguments is one thread's."""
        shape = np.broadcast_shapes(*(arg.array.shape for arg in map(tensor, args)))
        if shape[-1] != pack:
            raise NotImplementedError(f"{pack} elements a thread of a tensor {list(shape)}")
        inputs = [
            register
            for arg in map(tensor, args)
            for register in np.broadcast_to(_wide(arg), shape).reshape(-1, pack).T
        ]
        marks = [mark.strip() for mark in constraints.split(",")]
        tied = [int(mark) if mark.isdigit() else -1 for mark in marks[pack:]]
        if not all(mark.startswith("=") for mark in marks[:pack]) or len(tied) != len(inputs):
            raise AssertionError(f"{len(marks)} constraints for {len(inputs)} inputs of asm")
        return Tensor(run_asm(asm, pack, inputs, tied, self.memory).reshape(shape), dtype)


def _alike(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Return both as tensors; a number takes the type of the other one."""
    left = tensor(a, b if isinstance(b, Tensor) else None)
    return left, tensor(b, left)


def _wide(arg: Tensor) -> np.ndarray:
    return arg.array if arg.dtype.is_floating() else arg.array.astype(np.int64)


class Copies:
    """The asynchronous copies and barriers of ``nvidia.ampere`` and ``nvidia.hopper``."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def tma_load(
        self, tiles: Tiles, coord: Any, barrier: Barrier, result: Shared, pred: Any = True
    ) -> None:
        if not tensor(pred):
            return
        box = tiles.box(*(int(c) for c in coord))
        if list(box.shape) != result.shape:
            raise AssertionError(f"a box {list(box.shape)} is loaded into {result.shape}")
        clock = self.memory.copy(result.bytes(), raw_bytes(box), self.memory.me.clock)
        barrier.land(box.nbytes, clock)

    def cp_async(self, smem: Shared, pointer: Pointer, mask: Any = None, **_: Any) -> None:
        values = pointer.load(mask, 0).array
        if list(values.shape) != smem.shape:
            raise AssertionError(f"a tile {list(values.shape)} is copied into {smem.shape}")
        self.memory.copy(smem.bytes(), raw_bytes(values), self.memory.me.copies_know)

    def expect(self, barrier: Barrier, size: Any, pred: Any = True) -> None:
        if tensor(pred):
            barrier.arrive(expected=int(size))

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        if tensor(pred):
            barrier.arrive(count)

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if tensor(pred):
            barrier.wait(int(phase))

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Stand for a function that has no effect here."""

    def emulated(self) -> dict[str, Any]:
        """Return what stands for the functions of the real modules, by their names."""
        return {
            "mbarrier.MBarrierLayout": hopper.mbarrier.MBarrierLayout,
            "mbarrier.init": lambda barrier, count: barrier.init(int(count)),
            "mbarrier.invalidate": self.nothing,
            "mbarrier.expect": self.expect,
            "mbarrier.arrive": self.arrive,
            "mbarrier.wait": self.wait,
            "tma.async_load": self.tma_load,
            "tma.async_copy_global_to_shared": self.tma_load,
            "async_copy.async_load": self.cp_async,
            "async_copy.async_copy_global_to_shared": self.cp_async,
            "async_copy.commit_group": self.memory.commit_group,
            "async_copy.wait_group": lambda pending=0: self.memory.wait_group(int(pending)),
            "fence_async_shared": self.nothing,
        }
