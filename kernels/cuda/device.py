"""What a CUDA device can run, and why not the rest.

    compute capability       instruction    operands
    9.0                      wgmma.sp       bf16, fp16, int8, fp8
    8.0 8.6 8.7 8.9 12.0     mma.sp         bf16, fp16, int8

Those multiply a 2:4 sparse left operand at up to twice the dense rate. 10.0 and 11.0 have another
instruction (``tcgen05.mma.sp``), for which there is no kernel here. What mma.sp does with fp8 is
emulated on 9.0 and has no kernel elsewhere.

An instruction is used on a device once it has answered like the reference there (self_test.py). A
device on which it has not runs dense products of masked activations, and one warning says why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

KINDS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
"""The operands of a sparse product, as kernels name them."""

OLDEST_TRITON = (3, 6)


@dataclass(frozen=True)
class Instruction:
    """A sparse matrix instruction: its name, our module that issues it, and its operands."""

    name: str
    module: str
    kinds: tuple[str, ...]


WGMMA_SP = Instruction("wgmma.sp", "wgmma_sp", ("bf16", "fp16", "int8", "fp8"))
MMA_SP = Instruction("mma.sp", "mma_sp", ("bf16", "fp16", "int8"))
BY_CAPABILITY = {
    (9, 0): WGMMA_SP,
    **dict.fromkeys([(8, 0), (8, 6), (8, 7), (8, 9), (12, 0), (12, 1)], MMA_SP),
}


def instruction_of(capability: tuple[int, int]) -> Instruction | None:
    """Return the sparse matrix instruction of a compute capability that we have a kernel for."""
    return BY_CAPABILITY.get(capability)


def device_instruction(device: torch.device) -> Instruction | None:
    """Return the sparse matrix instruction of a CUDA device, or None."""
    return instruction_of(_assumed.get() or torch.cuda.get_device_capability(device))


_assumed: ContextVar[tuple[int, int] | None] = ContextVar("assumed", default=None)


@contextlib.contextmanager
def assumed(capability: tuple[int, int] | None) -> Iterator[None]:
    """Answer for a device of this compute capability that is not here; None: for those that are.

    There Triton is taken to be installed, and the self-test to pass.
    """
    before = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(before)


def why_no_triton() -> str | None:
    """Return why Triton kernels cannot be compiled here, or None."""
    return None if _assumed.get() else _why_no_triton_here()


@functools.cache
def _why_no_triton_here() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:  # a source tree, of whatever version
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is older than {oldest}"
    return None


def why_no_sparse_product(device: torch.device, kind: str) -> str | None:
    """Return why a CUDA device cannot multiply sparse operands of a kind, or None if it can.

    The first question about a kind runs the self-test, which waits for the device. It cannot while
    a CUDA graph is captured: ask once before, as the backend does.
    """
    if capability := _assumed.get():
        return _why_no_kernel(capability, kind)
    key = device.index, kind
    if key not in _known:
        if not torch.cuda.is_available():
            return "there is no CUDA device here"
        if torch.cuda.is_current_stream_capturing():
            return "its first use is inside a CUDA graph capture, where it cannot be tested"
        _known[key] = _ask(device, kind)
    return _known[key]


_known: dict[tuple[int | None, str], str | None] = {}


def _why_no_kernel(capability: tuple[int, int], kind: str) -> str | None:
    instruction = instruction_of(capability)
    if instruction is None:
        return f"no sparse kernel for compute capability {capability[0]}.{capability[1]}"
    if kind not in instruction.kinds:
        return f"{instruction.name} has no kernel for {kind}"
    return None


def _ask(device: torch.device, kind: str) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if reason := _why_no_kernel(capability, kind) or why_no_triton():
        return reason
    from amber_compile.kernels.cuda.self_test import why_wrong  # imports Triton

    if failure := why_wrong(device, kind):
        instruction = BY_CAPABILITY[capability]
        warnings.warn(
            f"amber: {instruction.name} for {kind} fails its self-test on {device}, so dense "
            f"products of masked activations run instead: {failure}",
            stacklevel=2,
        )
        return f"{instruction.name} failed its self-test: {failure}"
    return None
