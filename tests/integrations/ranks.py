"""Run a function on several processes of one gloo group, on this machine, and collect its answers.

    run(work, 2, folder, argument)   ->   [work(0, 2, argument), work(1, 2, argument)]

The processes are forked from one that has imported PyTorch and transformers already. A process
that fails fails the test with its traceback; one that waits for ever is killed, and fails it too.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

HEAVY = ["torch._dynamo", "torch.distributed.tensor.parallel", "torch.distributed.fsdp"]
HEAVY += [
    "transformers.distributed.tensor_parallel",
    "transformers.models.llama.modeling_llama",
    "amber_compile",
    "amber_compile.passes",
]


def run(
    work: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, seconds: float = 120
) -> list[Any]:
    """Return what ``work(rank, ranks, *arguments)`` returns on each of ``ranks`` processes.

    ``folder`` is for what they leave behind, and must be empty.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    processes = [
        context.Process(target=_rank, args=(work, rank, ranks, folder, arguments), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            break  # the others would wait for it
        time.sleep(0.05)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    said = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    if said:
        pytest.fail("\n".join(said))
    if late:
        pytest.fail(f"ranks {late} did not end within {seconds} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(
    work: Callable[..., Any], rank: int, ranks: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), ranks, rank
    )
    try:
        torch.save(work(rank, ranks, *arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)  # the group is not taken down together: the others may wait in it
    torch.distributed.destroy_process_group()
