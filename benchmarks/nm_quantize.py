"""How much of an int8 projection's time does quantising its input take on a CPU?

    python benchmarks/nm_quantize.py [--json] [--rounds 40] [--threads 1 4]

A cell is the time of ``nm_quantize`` (``4:4``: of ``quantize_rows``) relative to that of the
product, ``quantized_linear`` with as many outputs as it says: 10 % is a tenth on top. ``ps`` is the
time per element of 2:4 with factor and norm correction; ``reference`` is how many times longer the
same takes in PyTorch's operations. All that a row compares runs in turns, and the best of all
rounds counts, so that a busy machine hurts all alike. Every call allocates its result.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from nm_select import best_seconds
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from amber_compile.kernels import nm_quantize, quantize_rows, quantized_linear
from amber_compile.kernels.nm_quantize import nm_quantize_reference
from amber_compile.kernels.prepared_weight import prepare_weight

RESULTS = Path(__file__).with_name("results") / "nm_quantize.json"
OUTPUTS = 2048
SHAPES = [(512, 2048), (2048, 2048), (512, 8192), (2048, 8192)]
DTYPES = [torch.bfloat16, torch.float32]
CASES = {
    "4:4": (False, False, 4, 4, None),
    "4:4 smooth": (False, True, 4, 4, None),
    "2:4": (False, False, 2, 4, None),
    "2:4 factor": (True, False, 2, 4, None),
    "2:4 factor, norm": (True, False, 2, 4, "norm"),
    "2:4 factor, norm, smooth": (True, True, 2, 4, "norm"),
    "8:16 factor, norm": (True, False, 8, 16, "norm"),
}
REFERENCE_ROUNDS = 3  # it takes so long that noise matters less
Call = Callable[[], object]


def measure(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return one row: the time of the product and all that relates to it."""
    x, vector = torch.randn(shape).to(dtype), torch.rand(shape[1]) + 0.5
    calls: list[Call] = [product(x)]
    for weighted, smoothed, n, m, correction in CASES.values():
        factor, smooth = vector if weighted else None, vector if smoothed else None
        calls.append(quantization(x, factor, smooth, n, m, correction))
    multiplied, *times = best_seconds(calls, rounds)
    seconds = dict(zip(CASES, times, strict=True))
    best = seconds["2:4 factor, norm"]
    (slow,) = best_seconds(
        [lambda: nm_quantize_reference(x, vector, None, 2, 4, "int8", "norm")], REFERENCE_ROUNDS
    )
    row = {"GEMM GOP/s": 2e-9 * x.numel() * OUTPUTS / multiplied}
    row |= {name: each / multiplied for name, each in seconds.items()}
    return row | {"ps": best / x.numel() * 1e12, "reference": slow / best}


def product(x: torch.Tensor) -> Call:
    """Return the product that ``x`` is quantised for."""
    codes, row_scale = quantize_rows(x, None)
    weight, weight_scale = quantize_rows(torch.randn(OUTPUTS, x.shape[1]), None)
    prepared = prepare_weight(weight)
    return lambda: quantized_linear(codes, row_scale, prepared, weight_scale, None, x.dtype)


def quantization(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None,
) -> Call:
    """Return what a case measures."""
    if n == m:
        return lambda: quantize_rows(x, smooth)
    return lambda: nm_quantize(x, factor, smooth, n, m, "int8", correction)


def table(rows: list[dict[str, object]]) -> Table:
    """Lay the rows out, shares in percent."""
    shown = Table(*rows[0], title=f"time relative to an int8 product of {OUTPUTS} outputs")
    for row in rows:
        cells = [f"{v:.1%}" if name in CASES else v for name, v in row.items()]
        shown.add_row(*(f"{cell:.0f}" if isinstance(cell, float) else str(cell) for cell in cells))
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
