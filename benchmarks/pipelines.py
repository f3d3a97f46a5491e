"""What does each way of putting Amber into a pipeline cost?  Prefill of one model, in turns.

    python benchmarks/pipelines.py [--json] [--tokens 512] [--layers 4] [--rounds 9]

    inductor    torch.compile(model), bf16: what the others are compared with
    backend     torch.compile(model, backend="amber", options={"quantize": "int8"})
    pass        torch.compile(model, options={"post_grad_custom_pre_pass": AmberPass(...)})
    package     torch.export, amber_compile.rewrite, aoti_compile_and_package, aoti_load_package

All compute the same. They differ in how what follows from a weight reaches the graph: as a further
input, by a look-up in each call (a copy, too, as a compiler may reuse its memory), as a constant.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from cpu_prefill import Call, in_turns, random_llama, show
from machine import machine
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from amber_compile import AmberConfig, rewrite
from amber_compile.integrations.inductor import AmberPass

RESULTS = Path(__file__).with_name("results") / "pipelines.json"
CONFIG = AmberConfig(quantize="int8")


class Logits(nn.Module):
    """The logits of the last token: one tensor in, one out, as an export wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompt: Tensor) -> Tensor:
        answer = self.model(prompt, logits_to_keep=1, use_cache=False)
        logits: Tensor = answer.logits
        return logits


def packaged(model: nn.Module, prompt: Tensor, folder: str) -> Any:
    """Export, rewrite, compile and load ``model`` for prompts of this length."""
    program, _ = rewrite(torch.export.export(model, (prompt,)), CONFIG)
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
    return torch._inductor.aoti_load_package(path)


def ways(model: nn.Module, prompt: Tensor, folder: str) -> dict[str, Call]:
    """Compile ``model`` each way, and call it once."""
    makers = {
        "inductor": lambda: torch.compile(model, dynamic=False),
        "backend": lambda: torch.compile(
            model, backend="amber", dynamic=False, options=vars(CONFIG)
        ),
        "pass": lambda: torch.compile(
            model, dynamic=False, options={"post_grad_custom_pre_pass": AmberPass(CONFIG)}
        ),
        "package": lambda: packaged(model, prompt, folder),
    }
    calls: dict[str, Call] = {}
    for name, make in tqdm(makers.items(), desc="compile", leave=False):
        run = make()
        calls[name] = lambda run=run: run(prompt)
        calls[name]()
    return calls


@torch.inference_mode()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    model, rows = Logits(random_llama(arguments.layers)), []
    for tokens in arguments.tokens:
        torch.compiler.reset()
        prompt = torch.randint(0, model.model.config.vocab_size, (1, tokens))
        with tempfile.TemporaryDirectory() as folder:
            found = in_turns(ways(model, prompt, folder), arguments.rounds)
        rows += [
            {"T": tokens, "way": way, "seconds": time, "ratio": found["inductor"] / time}
            for way, time in found.items()
        ]
    where = machine() | {"threads": torch.get_num_threads(), "layers": arguments.layers}
    console = Console(width=118)
    console.print(show("prefill", rows))
    console.print("; ".join(f"{name}: {value}" for name, value in where.items()))
    if arguments.json:
        RESULTS.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
