"""What can the device do?  A large copy, and the dense products that cuBLAS does best.

Everything else is reported as a share of these, measured on the same device in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gpu_operands import Inputs, Shape, Weights
from gpu_variants import DENSE, MULTIPLY, variants
from timing import Clock, Time, in_turns

COPY_BYTES = 4 * 2**30
"""Read and written together: many times what a cache holds."""
SQUARE = 8192


def ceilings(
    clock: Clock, device: torch.device, copy_bytes: int = COPY_BYTES, square: int = SQUARE
) -> Iterator[dict[str, object]]:
    """Yield the rows ``copy`` (bytes a second) and ``dense <kind>`` (operations a second)."""
    source = torch.randint(0, 255, (copy_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield _row("copy", copy_bytes, in_turns(clock, {"": [partial(target.copy_, source)]})[""])
    del source, target
    generator = torch.Generator(device).manual_seed(0)
    weights = Weights.random(Shape("", square, square), device, generator)
    inputs = Inputs.random(weights, square, generator)
    products = [v for v in variants(device) if (v.library, v.stage) == (DENSE, MULTIPLY)]
    times = in_turns(clock, {v.name: [partial(v.run, inputs)] for v in products})
    for variant in products:
        name = f"dense {variant.kind} {variant.note}".strip()
        yield _row(name, 2 * square**3, times[variant.name])


def _row(name: str, amount: int, found: Time | str) -> dict[str, object]:
    if isinstance(found, str):
        return {"ceiling": name, "error": found}
    return {"ceiling": name, "per_second": amount / found.median, "spread": found.spread}


def best(rows: list[dict[str, object]], name: str) -> float | None:
    """Return the best rate of the ceilings whose name starts with ``name``."""
    found = [
        row["per_second"]
        for row in rows
        if str(row["ceiling"]).startswith(name) and isinstance(row.get("per_second"), float)
    ]
    return max(found, default=None)  # type: ignore[type-var]  # floats, as just asked
