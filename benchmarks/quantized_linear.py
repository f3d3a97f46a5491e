"""How fast is ``quantized_linear`` on a CPU?  Beside the 16-bit product, and oneDNN's int8 GEMM.

    python benchmarks/quantized_linear.py [--json] [--rounds 9] [--threads 1 4] [--cpu-seconds]

*bf16* is ``torch.nn.functional.linear``. *oneDNN u8* is the GEMM only, on activations of 8 bits
without sign, for which it has a fast kernel without AMX too, and with one scale. *ours* has both
scales, the bias and the rounding to bf16 in it. The weight is prepared beforehand, as is
oneDNN's. All that a row compares runs in turns, and the median counts.

``--cpu-seconds`` counts the seconds that all threads together had a core, for a machine that others
keep busy; set OMP_WAIT_POLICY=passive, that waiting threads may not count.

Few tokens wait for memory: there the weight's bytes a second stand beside those of ``sum``, which
reads as much.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from timing import Batch, Call, Clock, HostClock, Time, in_turns
from tqdm import tqdm

from amber_compile.kernels import quantized_linear
from amber_compile.kernels.int8_kernel import int8_kernel
from amber_compile.kernels.prepared_weight import prepare_weight

RESULTS = Path(__file__).with_name("results") / "quantized_linear.json"
SHAPES = [(2048, 2048), (4096, 4096), (2048, 8192), (8192, 2048), (8192, 8192)]  # K, N
TOKENS = [1, 4, 128, 512, 2048]
WAITING = 4  # tokens, up to which a product waits for memory
LARGEST = 1 << 36  # products of a call: the largest shapes with all tokens take too long


def entries(tokens: int, channels: int, outputs: int) -> dict[str, list[Call]]:
    """Return the calls that a row compares."""
    codes = torch.randint(-127, 128, (tokens, channels), dtype=torch.int8)
    weight = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8)
    x, w = codes.bfloat16(), weight.bfloat16()
    row_scale, scale, bias = torch.rand(tokens), torch.rand(outputs), torch.randn(outputs)
    prepared = prepare_weight(weight)
    words = weight.view(torch.int64)
    calls: dict[str, list[Call]] = {
        "bf16": [lambda: torch.nn.functional.linear(x, w)],
        "ours": [lambda: quantized_linear(codes, row_scale, prepared, scale, bias, torch.bfloat16)],
        "oneDNN u8": [onednn(codes, weight)],
    }
    return calls | ({"sum": [lambda: words.sum()]} if tokens <= WAITING else {})


def onednn(codes: torch.Tensor, weight: torch.Tensor) -> Call:
    """Return oneDNN's product of codes raised by 128 with its own packed weight."""
    raised = (codes.short() + 128).to(torch.uint8)
    outputs = weight.shape[0]
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scale, zero = torch.full([outputs], 2.0**-10), torch.zeros(outputs, dtype=torch.int64)
    tail = (None, 1.0, 0, torch.bfloat16, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(raised, 1.0, 128, packed, scale, zero, *tail)


@dataclass
class _CpuBatch:
    """A pass over some calls, by the cores' own clocks."""

    do: Sequence[Call]
    calls: int
    how: str = "cpu"

    def run(self) -> float:
        started = time.process_time()
        for call in self.do:
            call()
        return time.process_time() - started


class CpuClock:
    """Counts the seconds that the threads of this process had a core."""

    def batch(self, calls: Sequence[Call]) -> Batch:
        """Warm the calls up once."""
        for call in calls:
            call()
        return _CpuBatch(calls, len(calls))


def measure(sizes: tuple[int, int, int], rounds: int, clock: Clock) -> dict[str, object]:
    """Return one row for T, K and N: rates, and how many times faster ours is."""
    tokens, channels, outputs = sizes
    times = in_turns(clock, entries(*sizes), rounds)
    seconds = {name: taken.median for name, taken in times.items() if isinstance(taken, Time)}
    ours = seconds["ours"]
    row: dict[str, object] = {
        f"{name} GOP/s": 2 * tokens * channels * outputs / seconds[name] / 1e9
        for name in ("bf16", "oneDNN u8", "ours")
        if name in seconds
    }
    row |= {
        f"ours / {name}": seconds[name] / ours for name in seconds if name not in ("ours", "sum")
    }
    if "sum" in seconds:
        rates = (channels * outputs / seconds[name] / 1e9 for name in ("ours", "sum"))
        row |= dict(zip(("ours GB/s", "sum GB/s"), rates, strict=True))
    return row | {"ms": ours * 1e3}


def table(rows: list[dict[str, object]]) -> Table:
    """Lay the rows out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = Table(*names, title=f"quantized_linear, int8, {int8_kernel()}")
    for row in rows:
        cells = (row.get(name, "") for name in names)
        shown.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
    return shown


@torch.inference_mode()
def main() -> None:
    """Measure all sizes and thread counts, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each call")
    parser.add_argument("--cpu-seconds", action="store_true", help="count CPU time of all threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    arguments = parser.parse_args()
    seconds = "CPU seconds of all threads" if arguments.cpu_seconds else "wall clock"
    where, rows = {**machine(), "int8": int8_kernel(), "clock": seconds}, []
    settings = [(n, t, *s) for n in arguments.threads for t in arguments.tokens for s in SHAPES]
    settings = [s for s in settings if s[1] * s[2] * s[3] <= LARGEST]
    clock = CpuClock() if arguments.cpu_seconds else HostClock()
    for threads, *sizes in tqdm(settings, unit="row", leave=False):
        torch.set_num_threads(threads)
        head = dict(zip(("threads", "T", "K", "N"), (threads, *sizes), strict=True))
        rows.append({**head, **measure(tuple(sizes), arguments.rounds, clock)})
    console = Console(width=160)
    console.print(table(rows), "; ".join(f"{name}: {value}" for name, value in where.items()))
    if arguments.json:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
