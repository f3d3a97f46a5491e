"""How long until a client sees the first token, and how fast do the others come?  Over HTTP.

    python benchmarks/serve.py                                    the shipped model
    python benchmarks/serve.py --random 2048 4 --options quantize=int8 --lengths 128 512 1024

dense       examples/server.py --backend inductor
amber       examples/server.py --backend amber, with --options

Each server is a process of its own, compiled before it is measured. They take turns: in each round
each gets one prompt of random tokens of every length, streams its completion, and the first one is
a different one each round. First token: from the request to the first event. Tokens a second: of
the events behind it. Shown are medians over the rounds; ratios are dense by amber for the first
token, amber by dense for the rate, so that above 1 Amber is faster. ``--random HIDDEN LAYERS``
makes a Llama of random bf16 weights.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from ttft_models import build

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "python-lm"
RESULTS = Path(__file__).with_name("results") / "serve.json"
PATIENCE = 540  # seconds for a server to compile
VOCABULARY = 4096  # of the shipped tokenizer, which a random model has too
Row = dict[str, Any]

# ---- servers -------------------------------------------------------------------------------------


@contextmanager
def served(
    model: Path, backend: str, options: str = "", log: int | IO[str] = subprocess.DEVNULL
) -> Iterator[str]:
    """Start a server that prints to ``log``, wait for it, yield its address, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "server.py"), str(model)]
    command += [f"--port={port}", f"--backend={backend}", f"--options={options}"]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=log) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not answers(address):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server of {backend} did not start")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def answers(address: str) -> bool:
    """Return whether a server is there."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def random_model(folder: Path, hidden: int, layers: int) -> None:
    """Write a Llama of random bf16 weights, with the shipped tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=4096,
    )
    build(config, torch.device("cpu")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)


# ---- measurement ---------------------------------------------------------------------------------


def measure(address: str, prompt: Sequence[int], count: int) -> tuple[float, float]:
    """Return seconds to the first event of a completion, and events a second behind it."""
    asked = {"prompt": prompt, "max_tokens": count, "stream": True}
    body = json.dumps(asked | {"temperature": 0, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body)
    request.add_header("content-type", "application/json")
    started = time.perf_counter()
    arrived = []
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if line.startswith(b'data: {"id"'):
                arrived.append(time.perf_counter())
    if len(arrived) != count:
        raise RuntimeError(f"{len(arrived)} of {count} tokens came")
    return arrived[0] - started, (count - 1) / (arrived[-1] - arrived[0])


def in_turns(
    addresses: dict[str, str], lengths: Sequence[int], count: int, rounds: int
) -> list[Row]:
    """Return a row for each length and server, with medians over the rounds."""
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    names = list(addresses)
    draw = random.Random(0)
    for turn in tqdm(range(rounds + 1), desc="measuring", unit=" rounds"):
        for length in lengths:
            prompt = [draw.randrange(2, VOCABULARY) for _ in range(length)]
            for at in range(len(names)):
                name = names[(at + turn) % len(names)]
                times = measure(addresses[name], prompt, count)
                if turn:  # the first round warms up
                    found.setdefault((length, name), []).append(times)
    return [
        {
            "tokens": length,
            "server": name,
            "first": median(first for first, _ in times),
            "rate": median(rate for _, rate in times),
        }
        for (length, name), times in found.items()
    ]


# ---- what is shown -------------------------------------------------------------------------------


def table(rows: Sequence[Row], title: str) -> Table:
    """Lay the rows out, one a length."""
    shown = Table(title=title)
    for column in ("prompt", "first token: dense ms", "amber ms", "x"):
        shown.add_column(column, justify="right")
    for column in ("tokens/s: dense", "amber", "x"):
        shown.add_column(column, justify="right")
    for length in sorted({row["tokens"] for row in rows}):
        dense, amber = (
            next(row for row in rows if (row["tokens"], row["server"]) == (length, name))
            for name in ("dense", "amber")
        )
        shown.add_row(
            str(length),
            *(f"{1e3 * row['first']:.1f}" for row in (dense, amber)),
            f"{dense['first'] / amber['first']:.2f}",
            *(f"{row['rate']:.1f}" for row in (dense, amber)),
            f"{amber['rate'] / dense['rate']:.2f}",
        )
    return shown


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED, help="folder")
    parser.add_argument("--random", type=int, nargs=2, metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--options", default="", help="of amber, such as quantize=int8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--new", type=int, default=32, help="tokens written behind each prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dense", default="inductor", help="backend to compare with")
    parser.add_argument("--amber", default="amber", help="backend that is compared")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name} to results/")
    return parser.parse_args(arguments)


def main() -> None:
    """Start both servers, measure them in turns and print a table."""
    arguments = parse()
    with ExitStack() as stack:
        model = arguments.model
        if arguments.random:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory()), "random-llama")
            random_model(model, *arguments.random)
        context = AutoConfig.from_pretrained(model).max_position_embeddings
        lengths = sorted({min(length, context - arguments.new) for length in arguments.lengths})
        addresses = {
            "dense": stack.enter_context(served(model, arguments.dense)),
            "amber": stack.enter_context(served(model, arguments.amber, arguments.options)),
        }
        where = machine() | {"transformers": version("transformers")}
        rows = in_turns(addresses, lengths, arguments.new, arguments.rounds)
    shown = " ".join(filter(None, ("amber", arguments.options)))
    which = "{} hidden, {} layers".format(*arguments.random) if arguments.random else model.name
    title = f"{which}: {shown} beside {arguments.dense}"
    Console(width=100).print(table(rows, title), "; ".join(f"{k}: {v}" for k, v in where.items()))
    if arguments.json:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": where, "model": which, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
