"""Run Gluon kernels on NumPy: their bodies as they are, one program after the other.

    monkeypatch.setattr(wgmma_sp, "kernel", NumpyKernel(wgmma_sp.kernel))
    wgmma_sp.launch(...)                      # torch tensors on the CPU go in, and come out

Checked are index arithmetic, masks, metadata, the protocol of the barriers and the text of inline
assembly. Not checked is what Triton makes of the kernel, and where a layout puts an element: those
are the ahead-of-time tests' and the GPU's. A tensor here is logical, whatever its layout.

The errors are those of numpy_memory.py (races, deadlocks), numpy_ptx.py (descriptors, the protocol
of wgmma), instructions.py (metadata) and numpy_tensor.py (bounds, stores, overflows).
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from numpy_language import Copies, Language
from numpy_memory import SharedMemory
from numpy_tensor import Memory, Pointer, Tensor, Tiles, tensor
from triton.experimental.gluon import language as real
from triton.experimental.gluon.language.nvidia import ampere, hopper


class NumpyKernel:
    """A Gluon kernel that runs on NumPy when it is launched: ``kernel[grid](...)``."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launch(grid[0], args, kwargs)

    def launch(self, programs: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(self.kernel.fn)
        given = {name: kwargs[name] for name in kwargs if name in signature.parameters}
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        values = {
            name: value
            if "constexpr" in str(signature.parameters[name].annotation)
            else _argument(value)
            for name, value in bound.arguments.items()
        }
        for program in range(programs):
            memory = SharedMemory()
            body = bind(self.kernel, Language(memory, program, programs), Copies(memory))
            body(**values)
            memory.check_end()


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(Memory(value))
    if hasattr(value, "block_shape"):
        return Tiles(value)
    return tensor(value) if isinstance(value, int | float) else value


def bind(kernel: Any, language: Language, copies: Copies) -> Any:
    """Return the Python function of ``kernel``, with all that it calls replaced."""
    stand_ins: dict[int, Any] = {id(real): language}
    modules: dict[str, types.SimpleNamespace] = {}
    for name, stand_in in copies.emulated().items():
        module, _, attribute = name.rpartition(".")
        vars(modules.setdefault(module, types.SimpleNamespace()))[attribute] = stand_in
        for package in (ampere, hopper):
            found = getattr(package, module, None) if module else package
            if module and found is not None:
                stand_ins[id(found)] = modules[module]
            if hasattr(found, attribute):
                stand_ins[id(getattr(found, attribute))] = stand_in
    for name in ("thread_barrier", "barrier"):
        if hasattr(real, name):
            stand_ins[id(getattr(real, name))] = language.barrier
    return _translate(kernel, stand_ins, {})


def _translate(value: Any, stand_ins: dict[int, Any], done: dict[int, dict[str, Any]]) -> Any:
    if id(value) in stand_ins:
        return stand_ins[id(value)]
    if type(value).__name__ == "GluonJITFunction":
        return _function(value.fn, stand_ins, done)
    return value.value if isinstance(value, real.constexpr) else value


def _function(function: Any, stand_ins: dict[int, Any], done: dict[int, dict[str, Any]]) -> Any:
    scope = function.__globals__
    if id(scope) not in done:
        done[id(scope)] = names = {"range": _range}
        names.update((name, _translate(value, stand_ins, done)) for name, value in scope.items())
    return types.FunctionType(
        function.__code__, done[id(scope)], function.__name__, function.__defaults__
    )


def _range(*bounds: Any) -> Any:
    return (Tensor(i, real.int32) for i in range(*(int(bound) for bound in bounds)))
