"""What does 2:4 gain on this GPU?  Everything that decides it, in one run of under 8 minutes.

    python benchmarks/gpu.py [--out FILE] [--minutes 7.5] [--only rates gemm] [--tune]

    rates          dense and sparse matrix instructions alone (sm_90a): the bound of any kernel
    ceilings       a large copy, large dense products: what shares and fractions refer to
    correctness    every kind of ours against fp64, bit for bit where values only move
    compress       select + compress, and dense masks, as a share of the copy's bandwidth
    gemm           dense (cuBLAS, int8, fp8), cuSPARSELt and ours, at the shapes of two models
    tune           with --tune only: every tile shape of kernels/cuda/tiles.py, instead of the rest

Each part runs in a process of its own: one that crashes, hangs or runs out of time costs its own
rows and no others, and a kind of operand that did so in ``correctness`` is left out afterwards.
Rows are written as they are measured; ratios, crossovers and targets are computed from them
(``gpu_verdicts``). The exit status is 1 if a part failed, if anything of ours is wrong, or if there
is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_ceilings
import torch
from gpu_compress import compress
from gpu_correctness import KINDS, correctness
from gpu_gemm import gemm
from gpu_rates import rates
from gpu_tables import WIDTH, problems, tables
from gpu_tune import tune
from gpu_verdicts import crossovers, verdicts, with_ratios, with_shares
from machine import machine
from rich.console import Console
from timing import CudaClock

RESULTS = Path(__file__).with_name("results") / "gpu.json"
NO_GPU = "benchmarks/gpu.py measures an NVIDIA GPU, and PyTorch sees none here."
LIMITS = {
    "rates": 60.0,
    "ceilings": 45.0,
    **{f"correctness {kind}": 90.0 for kind in KINDS},
    "compress": 75.0,
    "gemm": 400.0,
    "tune": 540.0,
}
"""Seconds a part may take, its imports included, in the order of the parts."""
MARGIN = 20.0
"""Seconds before its limit at which a part starts nothing new."""

Result = dict[str, Any]

# ---- one part, in a process of its own -----------------------------------------------------------


def rows_of(part: str, kinds: Sequence[str], seconds: float) -> Iterator[dict[str, object]]:
    """Measure one part and yield its rows."""
    deadline = time.monotonic() + seconds - MARGIN
    device, clock = torch.device("cuda", torch.cuda.current_device()), CudaClock()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    ours = tuple(kind for kind in kinds if kind != "fp16")
    name, _, kind = part.partition(" ")
    if name == "rates":
        return rates(clock, device)
    if name == "ceilings":
        return gpu_ceilings.ceilings(clock, device)
    if name == "correctness":
        return correctness(device, kind)
    if name == "compress":
        return compress(clock, device, cache, ours)
    if name == "tune":
        return tune(clock, device, cache, deadline)
    return gemm(clock, device, cache, deadline, ours)


@torch.inference_mode()
def write_rows(part: str, kinds: Sequence[str], seconds: float, out: Path) -> None:
    """Measure one part and append its rows to a file, one JSON object a line."""
    with out.open("a") as file:
        for row in rows_of(part, kinds, seconds):
            file.write(json.dumps(row) + "\n")
            file.flush()


# ---- all parts -----------------------------------------------------------------------------------


def run_part(command: Sequence[str], out: Path, seconds: float) -> tuple[list[Any], str]:
    """Run a part; return the rows that it wrote, and why it did not end well, or ""."""
    try:
        status = subprocess.run([*command, "--write", str(out)], timeout=seconds).returncode
        error = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        error = f"killed after {seconds:.0f} s"
    whole_lines = out.read_text().split("\n")[:-1] if out.exists() else []
    return [json.loads(line) for line in whole_lines], error


def run_parts(parts: Sequence[str], minutes: float, out: Path) -> Result:
    """Run the parts in turn, each in what time is left, and store the result after each."""
    end = time.monotonic() + 60 * minutes
    result: Result = {"machine": machine(), "seconds": {}, "errors": {}}
    lost: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            started = time.monotonic()
            seconds = min(LIMITS[part], end - started)
            if seconds < MARGIN:
                result["errors"][part] = "no time left for it"
                continue
            kinds = [kind for kind in KINDS if kind not in lost]
            command = [sys.executable, __file__, "--part", part, "--kinds", *kinds]
            rows, error = run_part(
                [*command, "--seconds", f"{seconds:.0f}"], Path(folder) / part, seconds
            )
            name, _, kind = part.partition(" ")
            result.setdefault(name, []).extend(rows)
            result["seconds"][part] = round(time.monotonic() - started, 1)
            if error:
                result["errors"][part] = error
            if error or any("CUDA error" in str(row.get("wrong")) for row in rows):
                lost |= {kind}  # a device that has failed answers nothing more
            finish(result, out)
    return result


def finish(result: Result, out: Path) -> None:
    """Add what follows from the rows, and store the result."""
    if "gemm" in result:
        ceilings = result.get("ceilings", [])
        peaks = {kind: gpu_ceilings.best(ceilings, f"dense {kind}") for kind in KINDS}
        result["gemm"] = with_shares(with_ratios(result["gemm"]), peaks)
        result["crossovers"] = crossovers(result["gemm"])
    if "gemm" in result or "compress" in result:
        copy = gpu_ceilings.best(result.get("ceilings", []), "copy")
        result["verdicts"] = verdicts(result.get("gemm", []), result.get("compress", []), copy)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def failed(result: Result) -> bool:
    """Return whether a part failed, or anything of ours is wrong."""
    ours = [row for row in result.get("gemm", []) if row.get("library") == "amber"]
    wrong = [row for row in result.get("correctness", []) if row["wrong"]]
    return bool(result["errors"] or wrong or [row for row in ours if "error" in row])


def show(result: Result) -> None:
    """Print what went wrong, the tables, and where it was measured."""
    console = Console(width=WIDTH)
    for line in problems(result):
        console.print(f"! {line}", markup=False, highlight=False)
    for table in tables(result):
        console.print(table)
    taken = "; ".join(f"{part} {seconds:.0f} s" for part, seconds in result["seconds"].items())
    console.print("; ".join(f"{k}: {v}" for k, v in result["machine"].items()), f"\n{taken}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = list(dict.fromkeys(part.partition(" ")[0] for part in LIMITS))
    parser.add_argument("--out", type=Path, help=f"where the result goes: {RESULTS}")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything together")
    parser.add_argument("--only", nargs="+", choices=names, default=names[:-1])
    parser.add_argument("--tune", action="store_true", help="time every tile shape instead")
    hidden = argparse.SUPPRESS  # how a part is started
    parser.add_argument("--part", help=hidden, choices=LIMITS)
    parser.add_argument("--kinds", nargs="*", default=KINDS, help=hidden)
    parser.add_argument("--seconds", type=float, default=60.0, help=hidden)
    parser.add_argument("--write", type=Path, help=hidden)
    return parser.parse_args(arguments)


def main() -> int:
    """Measure what was asked for; return the exit status."""
    arguments = parse()
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print(NO_GPU, file=sys.stderr)
        return 1
    if arguments.part:
        write_rows(arguments.part, arguments.kinds, arguments.seconds, arguments.write)
        return 0
    only = ["tune"] if arguments.tune else arguments.only
    parts = [part for part in LIMITS if part.partition(" ")[0] in only]
    default = RESULTS.with_name("gpu_tiles.json") if arguments.tune else RESULTS
    result = run_parts(parts, arguments.minutes, arguments.out or default)
    show(result)
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
