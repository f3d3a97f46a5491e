"""Export a language model, rewrite it, package it, and run the package where there is no Amber.

    python examples/export.py
    python examples/export.py --quantize int8 --folder package

The package takes any prompt of 2 to 512 tokens. A second process, which has PyTorch and nothing
else, loads it with the library of Amber's operators, and runs it. What it predicts, and how long a
prefill takes, is compared with the rewritten program, run here operation by operation. examples/cpp
runs the same package without Python.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import AutoModelForCausalLM, AutoTokenizer

import amber_compile
from amber_compile.kernels.operator_library import build_operator_library

SHIPPED = Path(__file__).parent / "python-lm"
LONGEST = 512
PROMPTS = ("def add(a, b):\n    return", "import os\n\n\nclass Path:\n    def __init__(self,")

RUN = """
import sys, time
sys.modules["amber_compile"] = None  # not even by accident
import torch

folder = sys.argv[1]
torch.ops.load_library(f"{folder}/libamber_ops.so")
program = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
prompts = torch.load(f"{folder}/prompts.pt")
answers, seconds = [program(ids) for ids in prompts], []
for _ in range(9):
    started = time.perf_counter()
    program(prompts[-1])
    seconds.append(time.perf_counter() - started)
torch.save((answers, sorted(seconds)[4]), f"{folder}/answers.pt")
"""


class Logits(nn.Module):
    """A causal LM from token ids ``[1, S]`` to logits ``[1, S, vocabulary]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def export(model: nn.Module) -> ExportedProgram:
    """Export ``model`` for prompts of 2 to ``LONGEST`` tokens."""
    length = torch.export.Dim("length", min=2, max=LONGEST)
    example = torch.ones(1, 32, dtype=torch.int64)
    return torch.export.export(Logits(model), (example,), dynamic_shapes=({1: length},))


def package(program: ExportedProgram, path: Path) -> None:
    """Compile ``program`` to the package ``path``."""
    started = time.perf_counter()
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    size = path.stat().st_size / 1e6
    print(f"  {path.name}, {size:.1f} MB, compiled in {time.perf_counter() - started:.0f} s")


def run_elsewhere(folder: Path, prompts: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Run the package in a process without Amber; return its logits, and seconds a prefill."""
    torch.save(prompts, folder / "prompts.pt")
    subprocess.run([sys.executable, "-c", RUN, str(folder)], check=True)
    return torch.load(folder / "answers.pt")


def median_seconds(program: nn.Module, ids: Tensor) -> float:
    """Return how long a call takes: the median of nine."""
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        program(ids)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[4]


@contextmanager
def quiet() -> Iterator[None]:
    """Let PyTorch use what PyTorch deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@torch.no_grad()
def work(args: argparse.Namespace, folder: Path) -> None:
    """Do all there is to do, in ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    options = amber_compile.AmberConfig(pattern=args.pattern, quantize=args.quantize)
    with quiet():
        program, report = amber_compile.rewrite(export(model), options)
        print(f"{report.summary()}\n\nWritten to {folder}")
        package(program, folder / "model.pt2")
    print(f"  {build_operator_library(folder).name}")

    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    longest = torch.randint(1, model.config.vocab_size, (1, LONGEST))
    answers, seconds = run_elsewhere(folder, [*prompts, longest])
    show(tokenizer, program.module(), prompts, answers)
    here = median_seconds(program.module(), longest)
    print(f"\nA prefill of {LONGEST} tokens, the median of nine")
    print(f"  packaged, there   {1e3 * seconds:6.1f} ms")
    print(f"  uncompiled, here  {1e3 * here:6.1f} ms")
    ids = " ".join(map(str, prompts[0][0].tolist()))
    print(f"\nWithout Python:  next_token libamber_ops.so model.pt2 {ids}")


def show(tokenizer, here: nn.Module, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> None:
    """Print what the package predicts behind each prompt, and how far the program here is off."""
    print("\nIn a process without Amber: the next token, and the largest difference of a logit")
    for text, ids, there in zip(PROMPTS, prompts, answers, strict=False):
        written = tokenizer.decode(there[0, -1].argmax())
        off = (here(ids) - there).abs().max()
        print(f"  {text.splitlines()[-1]!r} -> {written!r}   {off:.1e}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SHIPPED, help="folder or hub name of a causal LM")
    parser.add_argument("--pattern", default="2:4", help="N:M, such as 2:4, 4:8, 8:16")
    parser.add_argument("--quantize", choices=["int8"], help="eight-bit codes")
    parser.add_argument("--folder", type=Path, help="where to keep the packages")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="amber-export-") as passing:
        folder = args.folder or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        work(args, folder)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
