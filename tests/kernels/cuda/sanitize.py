"""Run every kernel under ``compute-sanitizer``: bad accesses, races, and memory read unwritten.

    python tests/kernels/cuda/sanitize.py [--tools memcheck racecheck] [--kinds bf16] [--out DIR]

    memcheck     accesses outside of an allocation, or misaligned (allocations are not pooled)
    racecheck    shared memory that is read or written without a barrier between
    synccheck    barriers that not all threads reach
    initcheck    global memory that is read and was never written

Each tool runs this file again with ``--launch``, which launches each kernel at a few shapes with a
tail in every dimension. Inputs are drawn on the CPU, so that few kernels but ours run. The last
lines say what each tool found; the exit status is 1 if any found something or could not run. Not a
test that pytest collects: it takes minutes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
KINDS = ("bf16", "fp16", "int8", "fp8")
SIZES = ((1, 8, 64), (77, 136, 192), (130, 264, 448))
"""Tokens, outputs and channels."""
FP16 = torch.float16
FOUND = 99
"""What the sanitizer returns if it found anything."""
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: .*")

# ---- what is launched ----------------------------------------------------------------------------


def launch(kinds: Sequence[str]) -> None:
    """Launch every kernel of ours that this device has, once per shape and kind."""
    device = torch.device("cuda", torch.cuda.current_device())
    for kind in kinds:
        for sizes in SIZES:
            for name in _launched(kind, sizes, device):
                torch.cuda.synchronize()
                print(f"launched {name} {kind} {sizes}", flush=True)


def _launched(kind: str, sizes: tuple[int, int, int], device: torch.device) -> Iterator[str]:
    from amber_compile.kernels.cuda.device import device_instruction

    amber = torch.ops.amber
    x, weight, factor = (part.to(device) for part in _drawn(kind, *sizes))
    quantize = kind if kind in ("int8", "fp8") else None
    for correction in (None, "norm"):
        values, metadata, scale = amber.nm_compress(x, factor, quantize, correction)
        yield f"nm_compress {correction}"
    if quantize is None:
        amber.nm_select(x, factor, 2, 4, "norm")
        amber.nm_select(x, factor, 8, 16)
        yield "nm_select"
    else:
        amber.nm_compress(x, factor, quantize, "norm", factor)
        yield "nm_compress, smooth"
        for n, m, correction in ((2, 4, "norm"), (8, 16, "variance"), (4, 4, None)):
            codes, row_scale = amber.nm_quantize(x, factor, factor, n, m, quantize, correction)
            yield f"nm_quantize {n}:{m} {correction}"
        amber.quantized_linear(codes, row_scale, weight, factor[:1].expand(len(weight)), None, FP16)
        yield "quantized_linear"
    arguments = (values, metadata, weight, None, scale, None, None)
    instruction = device_instruction(device)
    names = {instruction.module if instruction else "mma_sp", "mma_sp"}
    for name in sorted(names):
        kernel = importlib.import_module(f"amber_compile.kernels.cuda.{name}")
        reason = kernel.why_not(*arguments)
        if not reason:
            kernel.launch(*arguments)
        yield f"{name}: {reason}" if reason else name


def _drawn(kind: str, tokens: int, outputs: int, channels: int) -> list[torch.Tensor]:
    """Draw activations, a weight and a factor on the CPU."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, channels, generator=generator)
    weight = torch.randn(outputs, channels, generator=generator)
    weight = (30 * weight).clamp(-127, 127) if kind == "int8" else weight
    factor = torch.rand(channels, generator=generator) + 0.5
    x = x.to(torch.float16 if kind == "fp16" else torch.bfloat16)
    return [x, weight.to(types.get(kind, torch.int8)), factor]


# ---- the sanitizer -------------------------------------------------------------------------------


def command(tool: str, kinds: Sequence[str]) -> list[str]:
    """Return how a tool is run on the launches."""
    return [
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)),
        *("--print-limit", "20", "--target-processes", "application-only"),
        *(sys.executable, __file__, "--launch", "--kinds", *kinds),
    ]


def sanitize(tool: str, kinds: Sequence[str], seconds: float, out: Path | None) -> tuple[bool, str]:
    """Run one tool; return whether all is well, and what it says in a line."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command(tool, kinds), env=environment, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"stopped after {seconds:.0f} s"
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{tool}.log").write_text(done.stdout)
    return verdict(done.returncode, done.stdout)


def verdict(status: int, log: str) -> tuple[bool, str]:
    """Return whether a run found nothing, and a line that says so, from what it printed."""
    found = SUMMARY.search(log)
    launches = len(re.findall(r"^launched ", log, flags=re.MULTILINE))
    summary = found[0] if found else "no summary"
    if status == 0 and found and launches:
        return True, f"{summary}, {launches} launches"
    last = [line for line in log.splitlines() if line.strip()][-3:]
    why = "" if status in (0, FOUND) else f", exit status {status}: {' | '.join(last)[:300]}"
    return False, f"{summary}, {launches} launches{why}"


def main() -> int:
    """Run the tools that were asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seconds", type=float, default=240.0, help="for each tool")
    parser.add_argument("--out", type=Path, help="a folder for what the tools print")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("sanitize.py launches kernels on an NVIDIA GPU, and PyTorch sees none here.")
        return 1
    if arguments.launch:
        launch(arguments.kinds)
        return 0
    if not shutil.which("compute-sanitizer"):
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit.")
        return 1
    well = True
    for tool in arguments.tools:
        good, said = sanitize(tool, arguments.kinds, arguments.seconds, arguments.out)
        well &= good
        print(f"{tool:<10} {'clean' if good else 'FOUND'}  {said}", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
