"""How fast is W8A8 with 2:4 activations on a CPU?  Linear layers and a whole model, in turns.

    python benchmarks/cpu_prefill.py [--json] [--linear | --model] [--tokens 512 2048] [--layers 16]

    linear     torch.compile(nn.Linear in bf16) against the same with backend="amber" and
               options={"quantize": "int8", "projections": ["*"]}: select, quantise and multiply
    model      prefill of a Llama with random weights and the sizes of Llama-3.2-1B (1.2 billion
               parameters), bf16, logits of the last token: plain torch.compile, amber with
               quantize="int8", 2:4 by the rule, and W8A8 without sparsity

All ways take turns in one process; a time is the median over the rounds, and a ratio says how many
times as fast as plain torch.compile in bf16. On a CPU the speed comes from 8 bits: nothing
multiplies sparse operands there, so 2:4 costs the selection and gains nothing. ``select`` is the
share of the selection and quantisation in the linear's time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import amber_compile  # noqa: F401  # its operators

RESULTS = Path(__file__).with_name("results") / "cpu_prefill.json"
SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096))
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
WAYS: dict[str, dict[str, object]] = {
    "bf16": {},
    "amber int8 + 2:4": {"quantize": "int8"},
    "amber int8": {"quantize": "int8", "projections": []},
}
Call = Callable[[], object]
Row = dict[str, float | int | str]


def in_turns(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Return the median time of each call, in seconds; they take turns, each twice to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - started)
    return {name: median(found[2:]) for name, found in times.items()}


def compiled(module: nn.Module, options: Mapping[str, object]) -> Callable[..., object]:
    """Compile for fixed shapes: plainly without options, otherwise by Amber."""
    if not options:
        return torch.compile(module, dynamic=False)
    return torch.compile(module, backend="amber", dynamic=False, options=dict(options))


def linear_rows(tokens: list[int], rounds: int) -> Iterator[Row]:
    """Yield the times of one linear layer of each size."""
    cases = [(count, *shape) for count in tokens for shape in SHAPES]
    for count, channels, outputs in tqdm(cases, desc="linear", leave=False):
        torch.compiler.reset()
        layer = nn.Linear(channels, outputs, bias=False, dtype=torch.bfloat16)
        x = torch.randn(1, count, channels, dtype=torch.bfloat16)
        options = {"quantize": "int8", "projections": ["*"]}
        plain, sparse = compiled(layer, {}), compiled(layer, options)
        factor = torch.rand(channels) + 0.5

        def select(x: Tensor = x, factor: Tensor = factor) -> object:
            return torch.ops.amber.nm_quantize(x, factor, None, 2, 4, "int8", "norm")

        calls = {
            "bf16": lambda plain=plain, x=x: plain(x),
            "int8": lambda sparse=sparse, x=x: sparse(x),
            "select": select,
        }
        found = in_turns(calls, rounds)
        ratio, share = found["bf16"] / found["int8"], found["select"] / found["int8"]
        yield {"T": count, "K": channels, "N": outputs, **found, "ratio": ratio, "share": share}


def model_rows(tokens: list[int], layers: int, rounds: int) -> Iterator[Row]:
    """Yield the prefill time of the whole model, each way."""
    model = random_llama(layers)
    parameters = sum(one.numel() for one in model.parameters())
    for count in tokens:
        torch.compiler.reset()
        prompt = torch.randint(0, model.config.vocab_size, (1, count))
        calls = {}
        for way, options in tqdm(WAYS.items(), desc=f"compile {count}", leave=False):
            run = compiled(model, options)
            calls[way] = lambda run=run, prompt=prompt: run(
                prompt, logits_to_keep=1, use_cache=False
            )
            calls[way]()
        found = in_turns(calls, rounds)
        for way, seconds in found.items():
            ratio = found["bf16"] / seconds
            head = {"parameters": parameters, "layers": layers, "T": count, "way": way}
            yield {**head, "seconds": seconds, "ratio": ratio}


def random_llama(layers: int) -> LlamaForCausalLM:
    """Return a Llama in bf16 with random weights and the sizes of Llama-3.2-1B."""
    config = LlamaConfig(**LLAMA_1B, num_hidden_layers=layers, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 0.02 if "norm" not in name else 1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def show(title: str, rows: list[Row]) -> Table:
    """Lay rows out: times in milliseconds."""
    shown = Table(*rows[0], title=title)
    for row in rows:
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    return shown


def _cell(name: str, value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    if name in ("ratio", "share"):
        return f"{value:.2f}x" if name == "ratio" else f"{value:.1%}"
    return f"{value * 1e3:.2f} ms"


@torch.inference_mode()
def main() -> None:
    """Measure what was asked for and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--linear", action="store_true", help="only linear layers")
    parser.add_argument("--model", action="store_true", help="only the whole model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    both = arguments.linear == arguments.model
    where = machine() | {"threads": torch.get_num_threads()}
    found: dict[str, list[Row]] = {}
    if arguments.linear or both:
        found["linear"] = list(linear_rows(arguments.tokens, arguments.rounds))
    if arguments.model or both:
        found["model"] = list(model_rows(arguments.tokens, arguments.layers, arguments.rounds))
    console = Console(width=118)
    for title, rows in found.items():
        console.print(show(title, rows))
    console.print("; ".join(f"{name}: {value}" for name, value in where.items()))
    if arguments.json:
        RESULTS.write_text(json.dumps({"machine": where, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
