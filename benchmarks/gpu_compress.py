"""How fast is the compression?  As a share of what a copy of the device reaches.

The bytes of a row are the fewest that the operation can move: the activation is read once, and
values, metadata and scales are written once. A quantising compression that reads its input twice
is therefore charged for it. ``quantize`` makes dense codes, ``select`` a dense mask. Small tensors
are bound by their launch: the target counts from ``LARGE`` bytes on, and each row also has the
bandwidth of a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_exact import Block, poison
from gpu_operands import Inputs, Shape, Weights, amber
from timing import Clock, Time, copies, in_turns
from torch import Tensor
from tqdm import tqdm

CHANNELS = (4096, 14336, 3584, 18944)
TOKENS = (8192, 2048, 512)
LARGE = 64 * 2**20
"""Bytes of an activation that no cache of these devices holds."""

KINDS = ("bf16", "int8", "fp8")
CORRECTIONS = (None, "norm")
MASKS = ((2, 4), (8, 16))


def compressed_bytes(tokens: int, channels: int, kind: str, scales: bool) -> int:
    """Return the bytes that one compression moves at least."""
    elements, tiles = tokens * channels, -(-tokens // 16)
    values = elements // 2 * (2 if kind == "bf16" else 1)
    metadata = tiles * (channels // 64) * 32 * 4
    return 2 * elements + values + metadata + 4 * channels + (4 * tokens if scales else 0)


def selected_bytes(tokens: int, channels: int) -> int:
    """Return the bytes that one dense-mask selection moves at least."""
    return 4 * tokens * channels + 4 * channels


def quantized_bytes(tokens: int, channels: int) -> int:
    """Return the bytes that the dense codes of an activation move at least."""
    return 3 * tokens * channels + 4 * tokens


Operation = Callable[[Inputs], object]


def operations(
    tokens: int, channels: int, kinds: tuple[str, ...]
) -> dict[str, tuple[int, Operation]]:
    """Return what is timed on one activation: its least bytes, and the call."""

    def compress(inputs: Inputs, kind: str, correction: str | None) -> object:
        return inputs.compress(kind, correction)

    def select(inputs: Inputs, n: int, m: int) -> Tensor:
        kept: Tensor = amber.nm_select(inputs.x, inputs.weights.factor, n, m)
        return kept

    def quantize(inputs: Inputs, kind: str) -> object:
        return amber.quantize_rows(inputs.x, None, kind)

    found: dict[str, tuple[int, Operation]] = {}
    for kind in kinds:
        for correction in CORRECTIONS:
            moved = compressed_bytes(tokens, channels, kind, kind != "bf16" or bool(correction))
            name = f"compress {kind}" + (f", {correction}" if correction else "")
            found[name] = moved, partial(compress, kind=kind, correction=correction)
    for kind in kinds:
        if kind != "bf16":
            found[f"quantize {kind}"] = (
                quantized_bytes(tokens, channels),
                partial(quantize, kind=kind),
            )
    for n, m in MASKS:
        found[f"select {n}:{m}"] = selected_bytes(tokens, channels), partial(select, n=n, m=m)
    return found


def compress(
    clock: Clock, device: torch.device, cache: int, kinds: tuple[str, ...] = KINDS
) -> Iterator[dict[str, object]]:
    """Yield one row per activation and operation, checked bit for bit before it is timed."""
    activations = [(tokens, channels) for tokens in TOKENS for channels in CHANNELS]
    for tokens, channels in tqdm(activations, desc="compress", leave=False):
        yield from compress_one(clock, device, cache, tokens, channels, kinds)


def compress_one(
    clock: Clock,
    device: torch.device,
    cache: int,
    tokens: int,
    channels: int,
    kinds: tuple[str, ...] = KINDS,
) -> Iterator[dict[str, object]]:
    """Yield the rows of one activation."""
    generator = torch.Generator(device).manual_seed(tokens + channels)
    weights = Weights.random(Shape("", channels, 64), device, generator)
    count = copies(2 * tokens * channels, cache)
    sets = [Inputs.random(weights, tokens, generator) for _ in range(count)]
    timed = operations(tokens, channels, kinds)
    wrong = {kind: _differs(sets[0], kind) for kind in kinds}
    entries: dict[str, list[Callable[[], object]]] = {
        name: [partial(call, inputs) for inputs in sets]
        for name, (_, call) in timed.items()
        if not any(wrong[kind] and kind in name for kind in kinds)
    }
    moved = compressed_bytes(tokens, channels, "bf16", False)
    entries["copy"] = [_copy(moved, device) for _ in sets]
    times = in_turns(clock, entries)
    copied = times.pop("copy")
    head = {"tokens": tokens, "channels": channels}
    for name, (moved, _) in timed.items():
        found = times.get(name, "not the reference's: " + "; ".join(filter(None, wrong.values())))
        yield head | {"operation": name} | bandwidth(moved, found, copied)


def bandwidth(moved: int, found: Time | str, copied: Time | str) -> dict[str, object]:
    """Return the columns of a row that come from its time."""
    if isinstance(found, str):
        return {"error": found}
    row: dict[str, object] = {
        "seconds": found.median,
        "spread": found.spread,
        "how": found.how,
        "bytes": moved,
        "bandwidth": moved / found.median,
    }
    if isinstance(copied, Time):
        row["copy_seconds"] = copied.median
    return row


def _differs(inputs: Inputs, kind: str) -> str:
    poison(inputs.x.device, [inputs.x.nbytes, inputs.x.nbytes // 2, inputs.x.nbytes // 4])
    try:
        wrong = Block.of(inputs).compression_differs(kind, inputs.compress(kind))
    except RuntimeError as error:
        wrong = str(error)[:200]
    return f"{kind} {wrong}" if wrong else ""


def _copy(moved: int, device: torch.device) -> Callable[[], object]:
    """Return a copy that moves so many bytes, half of them reads."""
    source = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return partial(target.copy_, source)
