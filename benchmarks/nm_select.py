"""How fast is ``nm_select`` on a CPU?  Against ``clone``, which moves as much, and against top-k.

    python benchmarks/nm_select.py [--json] [--rounds 40] [--threads 1 4]

A cell is bandwidth relative to ``torch.clone`` of the same tensor: 100 % is a selection for free.
The last column is how many times faster 2:4 is than the same selection written with ``topk``. All
that a row compares runs in turns, and the best of all rounds counts, so that a busy machine hurts
all alike. Every call allocates its result, as ``clone`` does; results above 32 MiB are fresh pages
each time, which cost more than either (THP_MEM_ALLOC_ENABLE=1 makes them cheap).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from amber_compile.kernels import nm_select

RESULTS = Path(__file__).with_name("results") / "nm_select.json"
SHAPES = [(512, 2048), (2048, 4096)]
DTYPES = [torch.bfloat16, torch.float32]
CASES = {
    "2:4": (False, 2, 4, None),
    "2:4 factor": (True, 2, 4, None),
    "2:4 norm": (False, 2, 4, "norm"),
    "2:4 factor, norm": (True, 2, 4, "norm"),
    "4:8": (False, 4, 8, None),
    "4:8 factor": (True, 4, 8, None),
    "8:16": (False, 8, 16, None),
    "8:16 factor": (True, 8, 16, None),
}
TOPK_ROUNDS = 3  # it takes so long that noise matters less


def topk_select(x: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Return the selection as it is usually written; which of equal channels wins is open."""
    groups = x.unflatten(-1, (-1, m))
    places = groups.abs().topk(n, sorted=False).indices
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True)
    return torch.where(keep, groups, 0).flatten(-2)


def best_seconds(calls: list[Callable[[], torch.Tensor]], rounds: int) -> list[float]:
    """Return the shortest time of each call over all rounds, in each of which all take a turn."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds + 1):  # the first one warms up
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - start)
    return best


def measure(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return one row: the bandwidth of ``clone`` and all that relates to it."""
    x = torch.randn(shape).to(dtype)
    factor = torch.rand(shape[1]) + 0.5
    calls: list[Callable[[], torch.Tensor]] = [x.clone]
    for weighted, n, m, correction in CASES.values():
        calls.append(
            lambda f=factor if weighted else None, n=n, m=m, c=correction: nm_select(x, f, n, m, c)
        )
    clone, *selections = best_seconds(calls, rounds)
    (topk,) = best_seconds([lambda: topk_select(x, 2, 4)], TOPK_ROUNDS)
    row = {"clone GB/s": 2 * x.nbytes / clone / 1e9}
    row |= {name: clone / seconds for name, seconds in zip(CASES, selections, strict=True)}
    return row | {"topk / 2:4": topk / selections[0]}


def table(rows: list[dict[str, object]]) -> Table:
    """Lay the rows out, ratios in percent."""
    shown = Table(*rows[0], title="bandwidth relative to torch.clone")
    for row in rows:
        cells = [f"{v:.0%}" if name in CASES else v for name, v in row.items()]
        shown.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells))
    return shown


@torch.inference_mode()
def main() -> None:
    """Measure all shapes, types and thread counts, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each call")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    arguments = parser.parse_args()
    where, rows = machine(), []
    settings = [(t, d, s) for t in arguments.threads for d in DTYPES for s in SHAPES]
    for threads, dtype, shape in tqdm(settings, unit="row", leave=False):
        torch.set_num_threads(threads)
        head = {"threads": threads, "dtype": str(dtype)[6:], "shape": "x".join(map(str, shape))}
        rows.append({**head, **measure(shape, dtype, arguments.rounds)})
    console = Console(width=160)
    console.print(table(rows), "; ".join(f"{name}: {value}" for name, value in where.items()))
    if arguments.json:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
