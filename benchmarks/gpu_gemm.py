"""How fast are products of 2:4 activations?  Every way beside every other, shape by shape.

All ways of one (shape, token count) run in turns on the same inputs, of which there are so many
sets that the cache cannot hold them. Each is checked against fp64 first (``gpu_exact``); one that
fails has its error in its row and is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from gpu_exact import Block, check
from gpu_operands import Inputs, Shape, Weights, points
from gpu_variants import AMBER, CHOOSING, W8A8, Variant, cusparselt, variants, why_not_sparse
from timing import Call, Clock, Time, copies, in_turns, reason
from tqdm import tqdm

Row = dict[str, object]


def gemm(
    clock: Clock,
    device: torch.device,
    cache: int,
    deadline: float = float("inf"),
    kinds: Sequence[str] = ("bf16", "int8", "fp8"),
    of: Iterable[tuple[Shape, int]] | None = None,
) -> Iterator[Row]:
    """Yield one row per shape, token count and variant; a skipped point has one row saying so.

    ``kinds`` are those of ours that may run; ``deadline`` is in ``time.monotonic`` seconds.
    """
    todo = list(points() if of is None else of)
    for shape, tokens in tqdm(todo, desc="products", leave=False):
        if time.monotonic() > deadline:
            yield head(shape, tokens) | {"skipped": "out of time"}
            continue
        yield from point(clock, device, cache, shape, tokens, kinds)


def point(
    clock: Clock,
    device: torch.device,
    cache: int,
    shape: Shape,
    tokens: int,
    kinds: Sequence[str] = ("bf16", "int8", "fp8"),
) -> Iterator[Row]:
    """Yield the rows of one shape and token count."""
    sets = operands(shape, tokens, device, cache)
    ways = [v for v in variants(device) if v.library != AMBER or v.kind in kinds]
    if device.type == "cuda":
        ways += cusparselt(sets[0], kinds)
    for row in compare(clock, sets, ways):
        yield head(shape, tokens) | row
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next sizes are others


def compare(clock: Clock, sets: Sequence[Inputs], ways: Sequence[Variant]) -> Iterator[Row]:
    """Check each way to multiply, time the right ones in turns, and yield one row for each."""
    block, work = Block.of(sets[0]), sets[0].operations()
    entries: dict[str, list[Call]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, Time | str] = {}
    for way in ways:
        try:
            errors[way.name], wrong = check(way, sets[0], block)
            wrong = wrong or _fallen_back(way, sets[0])
        except Exception as error:
            wrong = reason(error)
        if wrong:
            failed[way.name] = wrong
        else:
            entries[way.name] = _calls(way, sets)
    times = in_turns(clock, entries) | failed
    for way in ways:
        row = _columns(way) | {"error_of_budget": errors.get(way.name)}
        if way.note in CHOOSING:
            row["dense_because"] = why_not_sparse(way, sets[0])
        yield row | timed(work, times[way.name])


def operands(shape: Shape, tokens: int, device: torch.device, cache: int) -> list[Inputs]:
    """Draw as many sets as the cache cannot hold, judged by the smallest operands: 8 bit, 2:4."""
    count = copies((tokens // 2 + shape.outputs) * shape.channels, cache)
    generator = torch.Generator(device).manual_seed(hash((shape.channels, tokens)) % 2**31)
    weights = (Weights.random(shape, device, generator) for _ in range(count))
    return [Inputs.random(one, tokens, generator) for one in weights]


def _fallen_back(way: Variant, inputs: Inputs) -> str:
    """Return why what is to be timed as a sparse kernel is the reference, or ""."""
    dense = way.library != AMBER or way.note in (*CHOOSING, W8A8)
    if dense or inputs.x.device.type != "cuda":
        return ""
    reason_not = why_not_sparse(way, inputs)
    return f"runs the reference: {reason_not}" if reason_not else ""


def _calls(way: Variant, sets: Sequence[Inputs]) -> list[Callable[[], object]]:
    return [partial(way.run, inputs) for inputs in sets]


def head(shape: Shape, tokens: int) -> Row:
    """Return the columns that say which point a row is of."""
    return {
        "model": shape.model,
        "channels": shape.channels,
        "outputs": shape.outputs,
        "tokens": tokens,
    }


def _columns(way: Variant) -> Row:
    return {"library": way.library, "kind": way.kind, "stage": way.stage, "note": way.note}


def timed(work: int, found: Time | str) -> Row:
    """Return the columns of a row that come from its time."""
    if isinstance(found, str):
        return {"error": found}
    return {
        "seconds": found.median,
        "spread": found.spread,
        "how": found.how,
        "per_second": work / found.median,
    }
