"""The registers of a block of threads, and the PTX that only works on them; for ptx_machine.py.

A register is its bits, one int64 a thread; a predicate is a bool a thread. A statement that is not
understood raises ``KeyError`` by its name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
from instructions import from_bf16, to_bf16

Array = np.ndarray
Statement = tuple[bool, str | None, str, tuple[str, ...]]  # negated?, guard, opcode, operands

STATEMENT = re.compile(r"\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
LOW = 0xFFFFFFFF


@functools.cache
def parse(ptx: str) -> tuple[list[Statement], dict[str, int]]:
    """Return the statements of the only function, and where its labels are among them."""
    statements: list[Statement] = []
    labels = {}
    lines = [re.sub(r"//.*", "", line).strip() for line in ptx.splitlines()]
    for line in lines[lines.index("{") + 1 :]:
        if re.fullmatch(r"\$\w+:", line):
            labels[line[:-1]] = len(statements)
        elif match := STATEMENT.fullmatch(line):
            statements.append((match[1] == "!", match[2], match[3], split(match[4])))
        else:
            assert not line or line[0] in ".${}", f"PTX: {line}"
    return statements, labels


@functools.cache
def split(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces."""
    parts = re.findall(r"(?:\{[^}]*\}|[^,{}])+", text)
    return tuple(part.strip() for part in parts if part.strip())


class Registers:
    """The registers of ``threads`` threads of block ``program``."""

    def __init__(self, threads: int, program: int) -> None:
        self.threads, self.program = threads, program
        self.named: dict[str, Array] = {}

    def bits(self, operand: str) -> Array:
        """Return the bits [threads] of an operand, as int64."""
        operand = operand.strip()
        if operand.startswith("{"):
            parts = [self.bits(part) for part in split(operand[1:-1])]
            width = 16 if "%rs" in operand else 32
            return sum((part & (1 << width) - 1) << width * i for i, part in enumerate(parts))
        if operand in self.named:
            return self.named[operand]
        special = {"%tid.x": np.arange(self.threads), "%ctaid.x": self.program, "global_smem": 0}
        if operand in special:
            return np.broadcast_to(np.int64(special[operand]), self.threads)
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(self.threads, number, np.int64)

    def read(self, operand: str, kind: str) -> Array:
        bits = self.bits(operand)
        if kind == "pred":
            return bits.astype(bool)
        if kind == "f32":
            return bits.astype(np.uint32).view(np.float32)
        if kind == "f32x2":
            return np.ascontiguousarray(bits).view(np.float32).reshape(-1, 2)
        if kind == "bf16":
            return from_bf16(bits.astype(np.uint16))
        if kind == "f16":
            return bits.astype(np.uint16).view(np.float16).astype(np.float32)
        unsigned = {"16": np.uint16, "32": np.uint32, "64": np.uint64}[kind[1:]]
        if kind[0] == "s":
            return bits.astype(unsigned).view(np.dtype(unsigned).name[1:]).astype(np.int64)
        return bits if kind[1:] == "64" else bits.astype(unsigned).astype(np.int64)

    def vector(self, operand: str, kind: str) -> Array:
        return np.stack([self.read(x, kind) for x in split(operand.strip("{} "))], 1)

    def write(self, operand: str, bits: Array, mask: Array) -> None:
        if operand.startswith("{"):
            parts = split(operand[1:-1])
            width = 16 if "%rs" in operand else 32
            for i, part in enumerate(parts):
                self.write(part, bits >> width * i & (1 << width) - 1, mask)
            return
        old = self.named.get(operand, np.zeros_like(bits))
        self.named[operand] = np.where(mask, bits, old)

    def compute(self, name: str, rest: list[str], operands: tuple[str, ...], mask: Array) -> None:
        target, *sources = operands
        kind = rest[-1]
        with np.errstate(all="ignore"):
            if name == "cvt":
                result = self.convert(rest, sources)
            elif name == "selp":
                a, b = (self.bits(x) for x in sources[:2])
                result = np.where(self.named[sources[2]], a, b)
            elif name == "setp":
                result = COMPARISONS[rest[0]](*(self.read(x, kind) for x in sources))
            else:
                kinds = [kind, kind, f"{kind[0]}64" if rest[0] == "wide" else kind]
                function = ARITHMETIC.get(f"{name}.{rest[0]}") or ARITHMETIC[name]
                result = function(*map(self.read, sources, kinds))
                result = to_bits(result)
                if rest[0] != "wide" and kind[1:] == "32":
                    result = result & LOW
        self.write(target, result, mask)

    def convert(self, rest: list[str], sources: tuple[str, ...]) -> Array:
        to, source = rest[-2:]
        if to in ("bf16x2", "f16x2"):
            high, low = (half(self.read(x, "f32"), to[:-2]) for x in sources)
            return low | high << 16
        value = self.read(sources[0], source)
        if to in ("bf16", "f16"):
            return half(value, to)
        if to == "f32":
            return to_bits(value.astype(np.float32))
        return value if to[1:] == "64" else value & (1 << int(to[1:])) - 1


# ---- arithmetic ----------------------------------------------------------------------------------


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mul.hi": lambda a, b: a * b >> 32,  # of what is kept, wrapping around spoils nothing
    "mad": lambda a, b, c: a * b + c,
    "div": lambda a, b: (abs(a) // abs(b)) * np.sign(a) * np.sign(b),
    "rem": lambda a, b: np.fmod(a, b),
    "neg": lambda a: -a,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "bfe.u32": lambda a, first, length: a >> first & (1 << length) - 1,
    "bfe.s32": lambda a, first, length: a << 64 - first - length >> 64 - length,
}
COMPARISONS: dict[str, Callable[..., Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def to_bits(values: Array) -> Array:
    if values.dtype == np.float32 and values.ndim == 2:  # f32x2
        return np.ascontiguousarray(values).view(np.int64)[:, 0]
    if values.dtype == np.float32:
        return np.ascontiguousarray(values).view(np.uint32).astype(np.int64)
    return values


def half(values: Array, kind: str) -> Array:
    bits = to_bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
    return bits.astype(np.int64)
