"""Is a compiled wgmma_sp kernel's shared memory where the kernel's assembly reads it?

Triton does not tell a kernel where it has put an allocation, so the assembly relies on an order:
all stages of the weight from the start on, then those of the values. Where they really are shows in
the PTX: it is where the first slot's TMA copies go. A compiler that orders them otherwise, or that
computes addresses in a way that is not understood here, makes the launcher raise ``WrongOffsets``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import triton

from amber_compile.kernels.cuda.wgmma_sp_instruction import VALUES_WORDS, WEIGHT_WORDS, Tile


class WrongOffsets(RuntimeError):
    """Shared memory is not laid out as the kernel relies on; its results are not to be used."""


def check_offsets(compiled: Any, tile: Tile) -> None:
    """Raise ``WrongOffsets`` unless a compiled kernel puts its operands where it reads them."""
    if compiled.hash not in _checked:
        if difference := wrong_offsets(compiled.asm["ptx"], tile):
            raise WrongOffsets(f"{difference} (Triton {triton.__version__})")
        _checked.add(compiled.hash)


_checked: set[str] = set()


# ---- reading PTX ---------------------------------------------------------------------------------


def wrong_offsets(ptx: str, tile: Tile) -> str | None:
    """Return how the shared memory of a compiled kernel differs from what it relies on, or None.

    Read are the destinations of the first slot's copies.
    """
    weight = [stage * tile.columns * 4 * WEIGHT_WORDS for stage in range(tile.pair)]
    values_stage = tile.rows * 4 * VALUES_WORDS
    values = [tile.values_offset + stage * values_stage for stage in range(tile.pair)]
    try:
        found = sorted(_first_value(ptx, register) for register in COPY.findall(ptx))
    except _Unreadable as failure:
        return f"cannot read where in shared memory copies go: {failure}"
    if found != sorted(weight + values):
        return f"copies go to {found} in shared memory, not {sorted(weight + values)}"
    return None


COPY = re.compile(r"cp\.async\.bulk\.tensor\S*shared::(?:cta|cluster)\.global\S*\s+\[([^],]+)\]")
ARITHMETIC: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.hi": lambda a, b: a * b >> 32,
    "mad.lo": lambda a, b, c: a * b + c,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}


class _Unreadable(ValueError):
    """An instruction in the way that is not integer arithmetic."""


def _first_value(ptx: str, operand: str) -> int:
    """Return what an operand is the first time, counted from the start of shared memory."""
    if operand == "global_smem":
        return 0
    if "+" in operand:
        return sum(_first_value(ptx, term.strip()) for term in operand.split("+"))
    if not operand.startswith("%"):
        return int(operand, 0)
    written = re.search(rf"^\s*([a-z.]+?)\.[subf]\d+\s+{operand},\s*(.+);", ptx, re.M)
    if written is None or written[1] not in ARITHMETIC:
        raise _Unreadable(f"{operand} in {written[0].strip() if written else 'no instruction'}")
    return ARITHMETIC[written[1]](*(_first_value(ptx, term) for term in written[2].split(", ")))
