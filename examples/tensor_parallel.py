"""Prefill a model whose weights are spread over processes, sparsely, and compare with one process.

    python examples/tensor_parallel.py
    python examples/tensor_parallel.py --pattern 8:16 --backend amber

Two processes of this machine's CPU load the model as ``tp_plan="auto"`` spreads it: each has half
of the rows of q, k, v, gate and up, and half of the channels of o and down. Shown are what was
sparsified, and how far the logits are from those of one process that has the whole model, compiled
with the same options; beside it, how far apart the two are when both are dense.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import amber_compile

SHIPPED = Path(__file__).parent / "python-lm"
PROMPT = '''import asyncio


async def fetch(session, url):
    """Return the body of ``url``, or None if it cannot be had."""
    try:
'''


def load(folder: Path, spread: bool) -> nn.Module:
    """Return the model: whole, or this process's part of it."""
    how = {"distributed_config": DistributedConfig(tp_plan="auto")} if spread else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of ``tokens`` ``[1, S]``."""
    return model(tokens, use_cache=False).logits.clone()


def compile_prefill(model: nn.Module, backend: str, options: Mapping) -> None:
    """Compile the decoder layers one by one: they share their code."""
    amber_compile.register_model(model)
    for layer in model.model.layers:
        layer.compile(backend=backend, options=dict(options), dynamic=True)


def compare(rank: int, processes: int, store: str, args: argparse.Namespace) -> None:
    """Run both models in process ``rank``; the first one prints."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    models = [load(args.model, spread=True)]
    if rank == 0:
        models.append(load(args.model, spread=False))
    answers = []
    for model in models:
        dense = logits_of(model, tokens)
        compile_prefill(model, args.backend, {"pattern": args.pattern})
        answers.append((dense, logits_of(model, tokens)))
    if rank == 0:
        show(amber_compile.last_reports()[0], processes, *answers)
        weight = models[0].model.layers[0].mlp.down_proj.weight
        whole, own = list(weight.shape), list(weight.to_local().shape)
        print(f"down_proj is {whole}, of which each process has {own}")
    dist.destroy_process_group()


def show(report: amber_compile.Report, processes: int, spread: tuple, alone: tuple) -> None:
    """Print what was sparsified by several processes, and that they answer what one does."""
    print(f"{report}\n")
    print(f"Largest difference between the logits of {processes} processes and of one")
    for name, one, several in zip(("dense", "sparse"), alone, spread, strict=True):
        print(f"  {name:<7} {(one - several).abs().max():.1e}")
    print(f"  what sparsity changes: {(alone[0] - alone[1]).abs().max():.1e}\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SHIPPED, help="folder of a causal LM with a tp_plan")
    parser.add_argument("--pattern", default="2:4", help="N:M, such as 2:4, 4:8, 8:16")
    parser.add_argument("--processes", type=int, default=2, help="they share out attention's heads")
    parser.add_argument("--backend", choices=["amber", "amber_eager"], default="amber_eager")
    return parser.parse_args()


def main() -> None:
    args, started = arguments(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = args.processes, f"{folder}/store", args
        multiprocessing.spawn(compare, work, nprocs=args.processes)
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
