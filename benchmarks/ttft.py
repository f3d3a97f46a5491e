"""How long until the first token?  Prefill of whole models with random weights, beside decode.

    python benchmarks/ttft.py [--out FILE] [--models llama qwen2] [--tokens 2048 8192] [--layers 8]
    python benchmarks/ttft.py --config small               a tiny model, on a CPU, in a minute

    eager               the model as transformers runs it
    compile             torch.compile with Inductor
    amber               torch.compile(backend="amber"): 2:4 by the rule
    amber W8A8          int8 weights and activations in every projection but the head, none sparse
    amber int8          the same and 2:4 by the rule
    amber int8 decode   decode has the int8 weights too, and their 16-bit copies are released
    amber fp8           as amber int8, in e4m3

Prefill is one call on T tokens of one sequence, with the logits of the last token only; keys and
values are computed, and not kept. Decode is one more token behind T, in a cache of a fixed size. A
time is the median of several calls, each to its end. Weights are N(0, 0.02), drawn on the device:
no time depends on their values, except through power, which constants would flatter. Compiling 32
layers takes minutes; with ``--layers`` a model has fewer, and the ratios are those of its layers.
On a CPU 2:4 is emulated: there the ratios say what the emulation costs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from timing import reason
from torch import Tensor, nn
from tqdm import tqdm
from ttft_models import (
    MODELS,
    SMALL,
    WAYS,
    Session,
    build,
    configuration,
    releases_weights,
    why_not,
)

import amber_compile

RESULTS = Path(__file__).with_name("results") / "ttft.json"
Row = dict[str, Any]

# ---- measurement ---------------------------------------------------------------------------------


def measure(model: nn.Module, prompt: Tensor, way: str, rounds: int, device: torch.device) -> Row:
    """Return the columns of one way: first call, prefill and decode in seconds, bytes on a GPU."""
    if reason_not := why_not(way):
        return {"note": reason_not}
    try:
        session = Session.of(model, way, prompt)
        first = seconds(session.prefill, device)
        row: Row = {"first": first, "prefill": times(session.prefill, rounds, device)}
        if way.startswith("amber"):
            row["coverage"] = amber_compile.last_reports()[-1].coverage
        row["decode"] = times(session.decode, 2 * rounds, device, session.rewind)
        if device.type == "cuda":
            row["allocated"] = torch.cuda.memory_allocated(device)
    except Exception as error:  # out of memory, a compiler's: the other ways still count
        return {"error": reason(error)}
    return row


def times(
    call: Callable[[], object],
    rounds: int,
    device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Return the median time of a call, after two that warm up."""
    found = []
    for _ in range(rounds + 2):
        before()
        found.append(seconds(call, device))
    return median(found[2:])


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time a call, to the end of what it started on the device."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield one row per model, token count and way."""
    for name in arguments.models:
        config = configuration(name, arguments.config, arguments.layers)
        model = build(config, device)
        each = [(tokens, way) for tokens in arguments.tokens for way in arguments.ways]
        for count, way in tqdm(each, desc=name, leave=False):
            prompt = torch.randint(0, SMALL["vocab_size"], (1, count), device=device)
            head = {"model": name, "layers": config.num_hidden_layers, "tokens": count, "way": way}
            yield head | measure(model, prompt, way, arguments.rounds, device)
            if releases_weights(way):
                del model
                model = build(config, device)
        del model
        gc.collect()


def with_ratios(found: Sequence[Row]) -> list[Row]:
    """Return the rows, each with how many times as fast it is as Inductor's."""
    base = {
        (row["model"], row["tokens"]): row
        for row in found
        if row["way"] == "compile" and "prefill" in row
    }
    return [
        {
            **row,
            **{
                f"{what}_ratio": base[row["model"], row["tokens"]][what] / row[what]
                for what in ("prefill", "decode")
                if what in row and (row["model"], row["tokens"]) in base
            },
        }
        for row in found
    ]


# ---- what is shown -------------------------------------------------------------------------------


def table(found: Sequence[Row]) -> Table:
    """Lay the rows out, times in milliseconds and ratios to Inductor's."""
    columns = (
        "model",
        "layers",
        "T",
        "way",
        "prefill ms",
        "x",
        "decode ms",
        "x",
        "covered",
        "note",
    )
    shown = Table(*columns, title="x: times as fast as torch.compile")
    for row in found:
        cells = []
        for what in ("prefill", "decode"):
            cells.append(f"{row[what] * 1e3:.2f}" if what in row else "-")
            ratio = row.get(f"{what}_ratio")
            cells.append("-" if ratio is None else f"{ratio:.3f}")
        covered = f"{row['coverage']:.0%}" if "coverage" in row else ""
        note = row.get("note") or row.get("error", "")
        head = (row["model"], str(row["layers"]), str(row["tokens"]), row["way"])
        shown.add_row(*head, *cells, covered, note)
    return shown


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a small configuration has small token counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help=f"write the result there, as {RESULTS}")
    parser.add_argument("--config", choices=("full", "small"), default="full")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, help="instead of all of them")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each call")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found = parser.parse_args(arguments)
    if not found.tokens:
        found.tokens = [2048, 8192] if found.config == "full" else [128]
    return found


@torch.inference_mode()
def main() -> int:
    """Measure what was asked for and print a table."""
    arguments = parse()
    device = torch.device(arguments.device)
    if arguments.config == "full" and device.type != "cuda":
        print("Whole models want a GPU, and PyTorch sees none here: --config small runs on a CPU.")
        return 1
    where = machine() | {"transformers": version("transformers")}
    measured: list[Row] = []
    found: list[Row] = []
    for row in rows(arguments, device):
        measured.append(row)
        found = with_ratios(measured)
        if arguments.out:  # after every row, in case the time runs out
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            result = {"machine": where, "rows": found}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=118).print(table(found), "; ".join(f"{k}: {v}" for k, v in where.items()))
    return int(any("error" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
