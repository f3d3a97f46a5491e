"""Run the text of an inline PTX statement on NumPy, for all threads at once.

    run_asm(asm, outputs, inputs, tied, memory)        an operand: its values [threads]

Understood are integer arithmetic, ``shfl.sync.idx``, ``mma.sp`` and what surrounds ``wgmma.sp``:
shapes, selectors and metadata are taken from the text, and the operands of wgmma are read from the
bytes of shared memory through the descriptors that the text computes. Anything else is an error. So
are: a register that was not declared, a descriptor that differs between the threads of a warpgroup
or leaves its swizzle pattern, a wgmma without a fence before it or not waited for at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from instructions import KINDS, mma_sp, wgmma_sp
from numpy_memory import SharedMemory

SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}  # by the layout type in a descriptor
MMA = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k(\d+)\.row\.col\.(?:satfinite\.)?"
    r"(f32|s32)\.(\w+)\.\3\.\2"
)
WGMMA = re.compile(r"wgmma\.mma_async\.sp\.sync\.aligned\.m64n(\d+)k(\d+)\.(f32|s32)\.(\w+)\.\4")
TAILS = {"bf16": [1, 1, 1, 0, 0], "fp16": [1, 1, 1, 0, 0], "int8": [1], "fp8": [1, 1, 1]}
ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: a << b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
INTEGER = re.compile(r"(mov|add|sub|mul\.lo|mad\.lo|shr|shl|and|or|xor)\.[usb](32|64)")


def swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    """Return where TMA and wgmma put bytes: bits 4.. are xored with bits 7.. of the address."""
    return addresses ^ ((addresses >> 7) & (width // 16 - 1)) << 4


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{}])+", text) if part.strip()]


class Program:
    """One execution of a statement by ``threads`` threads."""

    def __init__(
        self, registers: list[np.ndarray | None], threads: int, memory: SharedMemory
    ) -> None:
        self.operands = registers
        self.named: dict[str, np.ndarray | None] = {}
        self.threads, self.memory = threads, memory
        self.fenced = False
        self.uncommitted = self.flying = 0

    def run(self, asm: str) -> None:
        for statement in re.sub(r"//[^\n]*", "", asm).split(";"):
            text = " ".join(statement.split())
            text = re.sub(r"^\{(?=\s*\.?[a-z])", "", text).strip()  # a scope, not a vector
            if text and text != "}":
                self.step(text)
        if self.uncommitted or self.flying:
            raise AssertionError("a wgmma is not waited for at the end of the statement")

    def step(self, text: str) -> None:
        opcode, _, rest = text.partition(" ")
        operands = split_operands(rest)
        if opcode == ".reg":
            self.named.update(dict.fromkeys([operands[0].split()[-1], *operands[1:]]))
        elif match := INTEGER.fullmatch(opcode):
            self.integer(match[1].split(".")[0], int(match[2]), operands)
        elif opcode == "shfl.sync.idx.b32":
            self.shuffle(operands)
        elif opcode.startswith("wgmma."):
            self.wgmma(opcode, operands)
        elif match := MMA.fullmatch(opcode):
            self.mma(match, operands)
        else:
            raise NotImplementedError(f"PTX: {text}")

    # ---- registers

    def value(self, operand: str) -> np.ndarray:
        """Return the 64-bit integers [threads] (or the accumulators) that an operand stands for."""
        if operand.startswith("{"):
            low, high = (self.value(part) for part in split_operands(operand[1:-1]))
            return (low & 0xFFFFFFFF) | high << 32
        if operand == "global_smem":
            return np.zeros(self.threads, np.int64)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return np.full(self.threads, int(operand, 0), np.int64)
        found = self.operands[int(operand[1:])] if operand[0] == "$" else self.named[operand]
        if found is None:
            raise AssertionError(f"PTX register {operand} is read before it is written")
        return found

    def words(self, operand: str) -> np.ndarray:
        """Return the registers [threads, n] of a vector operand, as 32-bit words."""
        registers = [self.value(part) for part in split_operands(operand[1:-1])]
        return (np.stack(registers, 1) & 0xFFFFFFFF).astype(np.uint32)

    def accumulators(self, operand: str) -> np.ndarray:
        return np.stack([self.value(part) for part in split_operands(operand[1:-1])], 1)

    def assign(self, operand: str, value: np.ndarray) -> None:
        if operand.startswith("{"):
            for part, column in zip(split_operands(operand[1:-1]), value.T, strict=True):
                self.assign(part, column)
        elif operand.startswith("$"):
            self.operands[int(operand[1:])] = value
        elif operand in self.named:
            self.named[operand] = value
        else:
            raise AssertionError(f"PTX register {operand} is not declared")

    def integer(self, name: str, bits: int, operands: list[str]) -> None:
        sources = [self.value(operand) for operand in operands[1:]]
        result = ARITHMETIC[name](*sources)
        self.assign(operands[0], result & 0xFFFFFFFF if bits == 32 else result)

    def shuffle(self, operands: list[str]) -> None:
        target, source, lane, *rest = operands
        if rest != ["0x1f", "0xffffffff"]:
            raise NotImplementedError(f"shfl {rest}")
        warps = self.value(source).reshape(-1, 32)
        lanes = self.value(lane).reshape(-1, 32)
        self.assign(target, np.take_along_axis(warps, lanes, 1).reshape(-1))

    # ---- tensor cores

    def mma(self, match: re.Match[str], operands: list[str]) -> None:
        kind = _kind(match[3], int(match[1]), match[2])
        d, a, b, c, metadata, selector = operands
        registers = (self.words(a), self.words(b), self.accumulators(c), self.value(metadata))
        chosen = int(selector, 0)
        warps = [slice(32 * w, 32 * w + 32) for w in range(self.threads // 32)]
        self.assign(
            d,
            np.concatenate([mma_sp(*(r[w] for r in registers), chosen, kind) for w in warps]),
        )

    def wgmma(self, opcode: str, operands: list[str]) -> None:
        if opcode == "wgmma.fence.sync.aligned":
            self.fenced = True
        elif opcode == "wgmma.commit_group.sync.aligned":
            self.flying, self.uncommitted = self.flying + bool(self.uncommitted), 0
        elif opcode == "wgmma.wait_group.sync.aligned":
            self.flying = min(self.flying, int(operands[0]))
        elif match := WGMMA.fullmatch(opcode):
            self.multiply(match, operands)
        else:
            raise NotImplementedError(f"PTX: {opcode}")

    def multiply(self, match: re.Match[str], operands: list[str]) -> None:
        if not self.fenced:
            raise AssertionError("wgmma without wgmma.fence before it")
        columns, kind = int(match[1]), _kind(match[4], int(match[2]), match[3])
        d, a, b, metadata, selector, *tail = operands
        if [int(flag) for flag in tail] != TAILS[kind]:
            raise AssertionError(f"wgmma.sp for {kind} ends with {tail}; valid: {TAILS[kind]}")
        before, words = self.accumulators(d), self.value(metadata)
        if before.shape[1] != columns // 2:
            raise AssertionError(
                f"{before.shape[1]} accumulators; m64n{columns} has {columns // 2}"
            )
        after = []
        for first in range(0, self.threads, 128):
            group = slice(first, first + 128)
            tiles = (
                self.operand(self.value(a)[group], 64, 32),
                self.operand(self.value(b)[group], columns, 64),
            )
            chosen = int(selector, 0)
            after.append(wgmma_sp(before[group], *tiles, words[group], chosen, kind))
        self.assign(d, np.concatenate(after))
        self.uncommitted += 1

    def operand(self, descriptors: np.ndarray, rows: int, size: int) -> np.ndarray:
        """Read a K-major tile of ``rows`` times ``size`` bytes through a matrix descriptor."""
        if len(set(descriptors.tolist())) != 1:
            raise AssertionError("the threads of a warpgroup give different descriptors")
        word = int(descriptors[0])
        start, stride = (word & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4
        width = SWIZZLE_BYTES[word >> 62 & 3]
        if word >> 49 & 7 or stride != 8 * width or start % width + size > width:
            raise AssertionError(f"descriptor {word:#x} leaves its {width}-byte swizzle pattern")
        row = np.arange(rows)[:, None]
        places = start + row // 8 * stride + row % 8 * width + np.arange(size)
        return self.memory.read(swizzled(places, width)).view(np.uint32)


def _kind(name: str, columns: int, accumulator: str) -> str:
    for kind, operands in KINDS.items():
        sums = "s32" if operands.accumulator is np.int32 else "f32"
        if (operands.ptx, operands.columns, sums) == (name, columns, accumulator):
            return kind
    raise AssertionError(
        f"no sparse instruction multiplies {name} with k{columns} to {accumulator}"
    )


def run_asm(
    asm: str, outputs: int, inputs: list[np.ndarray], tied: list[int], memory: SharedMemory
) -> np.ndarray:
    """Run ``asm`` on input operands [threads] that follow ``outputs`` output operands.

    Input i is in the same register as output ``tied[i]``, or in one of its own if that is -1.
    Returns the outputs [threads, outputs].
    """
    registers: list[np.ndarray | None] = [None] * outputs + list(inputs)
    for place, value in zip(tied, inputs, strict=True):
        if place >= 0:
            registers[place] = value
    program = Program(registers, len(inputs[0]), memory)
    program.run(asm)
    return np.stack([program.value(f"${i}") for i in range(outputs)], 1)
