"""What does the backend itself cost?  Beside Inductor, in one run and in turns.

    python benchmarks/backend.py [--json] [--rounds 200] [--threads 2] [--only rewrite decode]

    rewrite    analysing and rewriting a 32-layer Llama with 224 sparse projections: seconds, and
               as a share of the cold first call, compilation included
    binding    a call of what the backend returns, less the compiled graph inside: the look-up of
               224 weights and the tensors that are derived from them
    decode     one token through a compiled model: nothing in it is sparse
    prefill    512 tokens through a compiled model: 2:4 by the rule, and everywhere. On a CPU this
               is emulation: a selection more, no multiplication less

Times are medians. Weights are random: no time here depends on their values.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import fresh_cache
from tqdm import tqdm, trange
from transformers import LlamaConfig, LlamaForCausalLM

import amber_compile
from amber_compile.backend import compile_graph
from amber_compile.config import AmberConfig

RESULTS = Path(__file__).with_name("results") / "backend.json"
EVERYWHERE = {"projections": ["*.layers.*"]}
Row = dict[str, Any]


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """Return a random model: all the projections of a real one, whatever its width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def medians(calls: list[Callable[[], object]], rounds: int, label: str) -> list[float]:
    """Return the median time of each call; all take a turn in each round, each first by turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for turn in trange(rounds, desc=f"{label:<8}", leave=False):
        for place in range(len(calls)):
            which = (turn + place) % len(calls)
            times[which].append(seconds(calls[which]))
    return list(map(median, times))


# ---- what is measured ----------------------------------------------------------------------------


def rewrite(rounds: int) -> list[Row]:
    """Compile the same 32 layers cold, plainly and with 224 sparse projections."""
    model, tokens = llama(64, 32), torch.zeros(1, 16, dtype=torch.long)
    torch.compile(llama(64, 1))(tokens)  # what a process pays once: imports, compiler flags
    cold = {}
    for backend in tqdm(("inductor", "amber"), desc="rewrite ", leave=False):
        torch.compiler.reset()
        options = EVERYWHERE if backend == "amber" else None
        compiled = torch.compile(model, backend=backend, options=options)
        with fresh_cache():
            cold[backend] = seconds(partial(compiled, tokens))
    (graph,) = amber_compile.last_reports()[-1].graphs
    share = graph.seconds / cold["amber"]
    return [
        {"measure": f"rewrite, {graph.rewritten} sites", "value": graph.seconds, "unit": "s"}
        | {"target": 0.5},
        {"measure": "rewrite, share of the cold first call", "value": share * 100, "unit": "%"}
        | {"target": 5.0},
        {"measure": "cold first call", "amber": cold["amber"], "inductor": cold["inductor"]}
        | {"unit": "s"},
    ]


def binding(rounds: int) -> list[Row]:
    """Time the bound callable around a graph that does nothing."""
    caught: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def inner(*_: Any) -> Callable[..., None]:
            return lambda *arguments: None

        config = AmberConfig(projections=("*.layers.*",))
        caught[:] = [compile_graph(gm, inputs, config, inner), inputs]
        return gm.forward

    torch.compiler.reset()
    torch.compile(llama(64, 32), backend=backend)(torch.zeros(1, 16, dtype=torch.long))
    bound, inputs = caught
    sites = amber_compile.last_reports()[-1].graphs[0].rewritten
    longer = (*inputs, *[None] * sites)
    calls = [partial(bound, *inputs), partial(lambda *arguments: None, *longer)]
    whole, inside = medians(calls, 10 * rounds, "binding")
    return [
        {"measure": f"binding, {sites} sites", "value": (whole - inside) * 1e6, "unit": "µs"}
        | {"target": 100.0}
    ]


def decode(rounds: int) -> list[Row]:
    """Time one token: the graph is dense, so the two should be the same code."""
    return [_beside_inductor("decode, 1 token", 1, None, rounds) | {"target": 1.02}]


def prefill(rounds: int) -> list[Row]:
    """Time 512 tokens."""
    cases = {"by the rule": None, "all projections": EVERYWHERE}
    return [
        _beside_inductor(f"prefill, 512 tokens, 2:4 {name}", 512, options, max(1, rounds // 10))
        for name, options in cases.items()
    ]


def _beside_inductor(label: str, tokens: int, options: Any, rounds: int) -> Row:
    model = llama(512, 4)
    torch.compiler.reset()
    compiled = [
        torch.compile(model, backend="amber", options=options, dynamic=False),
        torch.compile(model, backend="inductor", dynamic=False),
    ]
    x = torch.randint(1024, (1, tokens))
    amber, inductor = medians(
        [partial(one, x) for one in compiled], rounds, label.partition(",")[0]
    )
    return {
        "measure": label,
        "amber": amber * 1e3,
        "inductor": inductor * 1e3,
        "unit": "ms",
        "value": amber / inductor,
    }


MEASURES = {"rewrite": rewrite, "binding": binding, "decode": decode, "prefill": prefill}

# ---- what is shown -------------------------------------------------------------------------------


def table(rows: list[Row]) -> Table:
    """Lay the rows out; ``value`` is a time, a share, or the ratio of the two times."""
    shown = Table("measure", "amber", "inductor", "value", "target", "met")
    for row in rows:
        unit = row["unit"]
        times = [f"{row[who]:.3g} {unit}" if who in row else "" for who in ("amber", "inductor")]
        if "amber" in row:
            unit = "x"
            row.setdefault("value", row["amber"] / row["inductor"])
        target = f"< {row['target']:g} {unit}" if "target" in row else ""
        met = ("yes" if row["value"] < row["target"] else "no") if "target" in row else ""
        shown.add_row(row["measure"], *times, f"{row['value']:.3g} {unit}", target, met)
    return shown


@torch.inference_mode()
def main() -> None:
    """Measure what was asked for and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--rounds", type=int, default=200, help="turns of each call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = machine() | {"threads": str(arguments.threads), "transformers": version("transformers")}
    rows = [row for name in arguments.only for row in MEASURES[name](arguments.rounds)]
    Console(width=110).print(table(rows), "; ".join(f"{k}: {v}" for k, v in where.items()))
    if arguments.json:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
