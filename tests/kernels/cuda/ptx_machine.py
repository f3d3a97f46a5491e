"""Run the PTX that Triton compiles a kernel to, on NumPy: the kernel's layouts and addresses too.

    monkeypatch.setattr(mma_sp, "mma_sp_kernel", PtxKernel(mma_sp.mma_sp_kernel, "sm_80"))
    mma_sp.launch(...)                        # torch tensors on the CPU go in, and come out

All threads of a block take every step together, which real ones do not: races are the business of
numpy_memory.py. But a ``cp.async`` makes its destination garbage when it is issued and delivers
when it is waited for, so nothing may be read in between. Errors are: an access outside of a tensor
or off its natural alignment, illegal metadata, a branch that only some threads take, and an
instruction that is not written here. ``conflicts`` counts what ldmatrix waits for banks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from aot import compile_for
from instructions import KINDS, mma_sp
from ptx_registers import LOW, Registers, parse, split, to_bits

POINTERS = {
    torch.int32: "*i32:16",
    torch.float32: "*fp32:16",
    torch.bfloat16: "*bf16:16",
    torch.float16: "*fp16:16",
}
ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+)\s*)?\]")
MMA = re.compile(r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k\d+\.row\.col\.\w+\.(\w+)\.")
TENSOR = 40  # bits of an address below the number of its tensor

Array = np.ndarray


class PtxKernel:
    """A kernel that is compiled for ``target`` and runs on NumPy when it is launched."""

    def __init__(self, kernel: Any, target: str) -> None:
        self.kernel, self.target = kernel, target
        self.conflicts = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launch(grid[0], args, kwargs)

    def launch(self, programs: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameters = inspect.signature(self.kernel.fn).parameters
        options = {name: kwargs[name] for name in kwargs if name not in parameters}
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        values = {name: named[name] for name in parameters}
        constants = {
            name: value
            for name, value in values.items()
            if value is None or "constexpr" in str(parameters[name].annotation)
        }
        passed = {name: value for name, value in values.items() if name not in constants}
        types = {name: _type(value) for name, value in passed.items()}
        compiled = compile_for(self.target, self.kernel, types, constants, **options)
        for program in range(programs):
            block = Block(compiled.ptx, [*passed.values()], program, compiled.shared)
            block.run()
            self.conflicts += block.conflicts


def _type(value: Any) -> str:
    return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"


class Block(Registers):
    """The threads of one block: their registers, shared memory, and where they are."""

    def __init__(self, ptx: str, arguments: list[Any], program: int, shared: int) -> None:
        self.statements, self.labels = parse(ptx)
        size = re.search(r"\.reqntid (\d+)", ptx)
        assert size is not None
        super().__init__(int(size[1]), program)
        self.shared = np.full(shared, 0xFF, np.uint8)  # NaN, and illegal as metadata
        self.tensors = [_bytes(x) if isinstance(x, torch.Tensor) else None for x in arguments]
        self.arguments = [
            i + 1 << TENSOR if isinstance(x, torch.Tensor) else x for i, x in enumerate(arguments)
        ]
        self.copies: list[list[tuple[Array, Array]]] = [[]]  # by group, the last one open
        self.conflicts = 0

    def run(self) -> None:
        everyone = np.ones(self.threads, bool)
        at = 0
        while True:
            negated, guard, opcode, operands = self.statements[at]
            at += 1
            mask = self.named[guard] ^ negated if guard else everyone
            if opcode == "ret":
                return
            if opcode.startswith("bra"):
                assert mask.all() or not mask.any(), f"threads part at statement {at}"
                at = self.labels[operands[0]] if mask.any() else at
            else:
                self.step(opcode, operands, mask)

    def step(self, opcode: str, operands: tuple[str, ...], mask: Array) -> None:
        name, *rest = opcode.split(".")
        if name in ("ld", "st"):
            self.access(name, rest, operands, mask)
        elif name == "ldmatrix":
            self.matrices(rest, operands[0], operands[1])
        elif name == "stmatrix":
            self.matrices(rest, operands[1], operands[0], store=True)
        elif opcode.startswith("cp.async"):
            self.cp_async(rest, operands, mask)
        elif name == "mma":
            self.mma(opcode, operands)
        elif name != "bar":
            self.compute(name, rest, operands, mask)

    # ---- memory

    def places(self, operand: str) -> Array:
        match = ADDRESS.fullmatch(operand)
        assert match is not None, operand
        return self.bits(match[1]) + int(match[2] or 0)

    def memory(self, space: str, address: Array, size: int) -> tuple[Array, Array]:
        """Return the bytes that hold ``size`` at every address, and their places [..., size]."""
        assert not (address % size).any(), f"an address off its {size}-byte alignment"
        if space == "shared":
            memory = self.shared
        else:
            (tensor,) = set((address >> TENSOR).tolist())
            memory, address = self.tensors[tensor - 1], address & (1 << TENSOR) - 1
        if ((address < 0) | (address + size > len(memory))).any():
            raise IndexError(f"{space} memory of {len(memory)} bytes is left")
        return memory, address[..., None] + np.arange(size)

    def access(self, name: str, rest: list[str], operands: tuple[str, ...], mask: Array) -> None:
        if rest[0] == "param":
            number = int(operands[1].rstrip("]").rpartition("_")[2])
            value = self.arguments[number] if number < len(self.arguments) else 0
            return self.write(operands[0], np.full(self.threads, value, np.int64), mask)
        place, registers = operands if name == "st" else operands[::-1]
        names = split(registers.strip("{} "))
        size = int(rest[-1][1:]) // 8
        if not mask.any():
            return None
        address = self.places(place)[mask]
        memory, where = self.memory(rest[0], address, size * len(names))
        for i, register in enumerate(names):
            part = where[:, size * i : size * (i + 1)]
            if name == "st":
                raw = self.bits(register)[mask].astype(np.int64)
                memory[part] = raw[:, None].view(np.uint8)[:, :size]
            else:
                result = np.zeros((self.threads, 8), np.uint8)
                result[mask, :size] = memory[part]
                self.write(register, result.view(np.int64)[:, 0], mask)
        return None

    def matrices(self, rest: list[str], vector: str, place: str, store: bool = False) -> None:
        """Move matrices of 8 rows x 16 bytes: lane l has word l % 4 of row l // 4."""
        assert "trans" not in rest
        registers = split(vector.strip("{} "))
        address = self.places(place).reshape(-1, 4, 8)[:, : len(registers)]
        banks = np.sort(address // 16 % 8, axis=-1)
        self.conflicts += int((banks[..., 1:] == banks[..., :-1]).sum())
        memory, where = self.memory("shared", address, 16)
        if store:
            words = self.vector(vector, "u32").astype(np.uint32).reshape(-1, 8, 4, len(registers))
            memory[where] = np.ascontiguousarray(words.transpose(0, 3, 1, 2)).view(np.uint8)
            return
        words = memory[where].view(np.uint32)  # [warp, matrix, row, word]
        for i, register in enumerate(registers):
            self.write(register, words[:, i].reshape(-1).astype(np.int64), np.True_)

    def cp_async(self, rest: list[str], operands: tuple[str, ...], mask: Array) -> None:
        if rest[1] == "commit_group":
            self.copies.append([])
        elif rest[1] == "wait_group":
            while len(self.copies) - 1 > int(operands[0]):
                for where, data in self.copies.pop(0):
                    self.shared[where] = data
        elif mask.any():
            to, source = (self.places(x)[mask] for x in operands[:2])
            size = int(operands[2], 0)
            live = self.bits(operands[3])[mask] > 0 if len(operands) > 3 else np.ones(len(to), bool)
            _, where = self.memory("shared", to, size)
            data = np.zeros(where.shape, np.uint8)
            if live.any():
                memory, places = self.memory("global", source[live], size)
                data[live] = memory[places]
            self.shared[where] = 0xFF
            self.copies[-1].append((where, data))

    # ---- tensor cores

    def mma(self, opcode: str, operands: tuple[str, ...]) -> None:
        match = MMA.match(opcode)
        assert match is not None, opcode
        (kind,) = (name for name, operand in KINDS.items() if operand.ptx == match[1])
        number = "s32" if kind == "int8" else "f32"
        a, b = (self.vector(x, "u32").astype(np.uint32) for x in operands[1:3])
        c, metadata = self.vector(operands[3], number), self.bits(operands[4])
        for first in range(0, self.threads, 32):
            w = slice(first, first + 32)
            c[w] = mma_sp(a[w], b[w], c[w], metadata[w], int(operands[5], 0), kind)
        for register, column in zip(split(operands[0].strip("{} ")), c.T, strict=True):
            bits = to_bits(column) if kind != "int8" else column & LOW
            self.write(register, bits, np.True_)


def _bytes(tensor: torch.Tensor) -> Array:
    assert tensor.is_contiguous()
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
