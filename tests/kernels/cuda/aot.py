"""Compile a Triton or Gluon kernel for a GPU that is not there, and look at what came out.

    compiled = compile_for(
        "sm_90",
        kernel,                                             # @triton.jit or @gluon.jit
        {"x_ptr": "*bf16:16", "tokens": "i32", "channels": "i32:16"},
        {"BLOCK": 128, "STAGES": 3},                        # the constexpr arguments
        num_warps=4,
    )
    assert compiled.count("HMMA.SP") == 64
    assert not compiled.spills
    assert compiled.registers <= 255

A type is Triton's own (``i32``, ``*fp32``, ``tensordesc<...>``); ``:16`` says that the number or
the address is a multiple of 16, as Triton finds out by itself when it launches a kernel. Every
argument needs an entry in one of the two mappings. Options are those of a launch (``num_warps``,
``num_stages``, ``maxnreg``). A kernel that does not compile raises Triton's error, ptxas' included.

The targets are sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (from 90 on with all that is particular
to the architecture: sm_90a). A kernel is compiled once a process for the same arguments.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")
gluon_runtime = pytest.importorskip("triton.experimental.gluon._runtime", reason="needs Gluon")

# Shared memory that a block may ask for on each target, in bytes (CUDA C++ Programming Guide,
# "Compute capabilities": the size per multiprocessor less the 1 KiB that the system takes).
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel became: the resources it takes, and its text on both levels."""

    target: str
    registers: int  # per thread; where warps are specialised, before they are handed over
    spilled_bytes: int  # stored and loaded, as ptxas counts them
    shared: int  # bytes a block asks for when it is launched
    warnings: tuple[str, ...]  # of ptxas; C75xx says that wgmma was serialised
    ptx: str = field(repr=False)
    sass: str = field(repr=False)

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """How often each SASS opcode stands in the program, e.g. ``HMMA.SP.16832.F32.BF16``."""
        return Counter(_INSTRUCTION.findall(self.sass))

    def count(self, prefix: str) -> int:
        """Return the number of instructions that are ``prefix`` or one of its variants."""
        found = self.opcodes.items()
        return sum(n for opcode, n in found if f"{opcode}.".startswith(f"{prefix}."))

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory, where registers spill to."""
        return self.count("LDL") + self.count("STL")

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread from global memory."""
        return self._global_accesses("LDG", "128")

    @property
    def wide_stores(self) -> int:
        """Stores of 16 bytes a thread to global memory."""
        return self._global_accesses("STG", "128")

    @property
    def serialised(self) -> tuple[str, ...]:
        """The warnings that say that asynchronous matrix products wait for each other."""
        return tuple(line for line in self.warnings if re.search(r"C75\d\d", line))

    @functools.cached_property
    def tma_destinations(self) -> tuple[int, ...]:
        """Where in shared memory each TMA load puts its tile in the first pass of its loop."""
        return tuple(_value(self.ptx, register) for register in _TMA_LOAD.findall(self.ptx))

    def _global_accesses(self, opcode: str, width: str) -> int:
        found = self.opcodes.items()
        return sum(n for name, n in found if name.startswith(opcode) and width in name.split("."))


def compile_for(
    target: str,
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    **options: Any,
) -> Compiled:
    """Compile ``kernel`` for ``target`` with typed ``arguments``; see the top of this file."""
    constants = constants or {}
    unnamed = {*kernel.arg_names} ^ {*arguments, *constants}
    assert not unnamed, f"arguments of {kernel.__name__} that are missing or unknown: {unnamed}"
    signature = {name: _type(arguments.get(name)) for name in kernel.arg_names}
    place = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    aligned = [name for name, kind in arguments.items() if kind.endswith(":16")]
    source = (gluon_runtime.GluonASTSource if kernel.is_gluon() else triton.compiler.ASTSource)(
        kernel,
        signature,
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    # 3.9 warns that the default of this option will change
    options = {"enable_fp_fusion": True, **options}
    key = (target, source.hash(), repr(sorted(options.items())))
    if key not in _compiled:
        _compiled[key] = _compile(target, source, options)
    return _compiled[key]


_compiled: dict[tuple[str, str, str], Compiled] = {}

_LANGUAGE = triton.language
_PLACES = (
    *(_LANGUAGE, _LANGUAGE.core, _LANGUAGE.math),
    *(_LANGUAGE.tensor, _LANGUAGE.dtype, _LANGUAGE.condition),
    _LANGUAGE.core.tensor_descriptor_base,
)
_MEMBERS = [(place, dict(vars(place))) for place in _PLACES]


def _mend_language() -> None:
    """Take back what Triton's interpreter has done to the language that is compiled.

    It replaces builtins while a kernel runs. ``InterpretedFunction.__call__`` does so again and
    restores nothing, so that some of triton.language.core stay replaced (seen in 3.6 and 3.9).
    """
    for place, members in _MEMBERS:
        for name in vars(place).keys() - members.keys():
            if isinstance(place, type):
                delattr(place, name)
        for name, member in members.items():
            if vars(place).get(name) is not member:
                setattr(place, name, member)


def _type(argument: str | None) -> str:
    return "constexpr" if argument is None else argument.removesuffix(":16")


def _compile(target: str, source: Any, options: dict[str, Any]) -> Compiled:
    _mend_language()
    gpu = triton.backends.compiler.GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    log = io.StringIO()
    knobs = triton.knobs
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),  # where Triton prints what ptxas says
    ):
        knobs.cache.dir = folder  # an empty one: a kernel that is found there has no log
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=gpu, options=options)
        sass = _disassemble(kernel.asm["cubin"], folder)
    return _read(target, kernel, log.getvalue(), sass)


def _disassemble(cubin: bytes, folder: str) -> str:
    path = os.path.join(folder, "kernel.cubin")
    with open(path, "wb") as file:
        file.write(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read(target: str, kernel: Any, log: str, sass: str) -> Compiled:
    return Compiled(
        target=target,
        registers=max(int(number) for number in re.findall(r"Used (\d+) registers", log)),
        spilled_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
        shared=kernel.metadata.shared,
        warnings=tuple(line for line in log.splitlines() if re.search(r"warning|\(C\d+\)", line)),
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


# ---- reading SASS and PTX ------------------------------------------------------------------------

# "        /*0010*/              @!P0 HMMA.SP.16832.F32.BF16 R4, R8, ..."
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.M)

_TMA_LOAD = re.compile(r"cp\.async\.bulk\.tensor\S*shared::(?:cta|cluster)\.global\S*\s+\[(%r\d+)")

_ARITHMETIC = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}


def _value(ptx: str, operand: str) -> int:
    """Return the first value that ``operand`` takes, counted from the start of shared memory."""
    if operand == "global_smem":
        return 0
    if not operand.startswith("%"):
        return int(operand, 0)
    written = re.search(rf"^\s*(\w+)\.\S+\s+{operand},\s*(.+);", ptx, re.M)
    assert written is not None, f"nothing writes {operand}"
    assert written[1] in _ARITHMETIC, f"{operand} depends on {written[0].strip()}"
    return _ARITHMETIC[written[1]](*(_value(ptx, term) for term in written[2].split(", ")))
