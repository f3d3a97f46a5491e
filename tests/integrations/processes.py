"""What tests of caches and processes share: a compiled model, and processes that answer in JSON.

A script prints one line of JSON at its end. It finds the test models and what is defined here.
"""

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stack import Stack
from torch import Tensor
from torch._dynamo.utils import counters

TESTS = Path(__file__).parents[1]
PATIENCE = 120  # seconds after which a process is taken to hang
HEADER = """
import json, sys, threading, time, torch
from stack import Stack, sparse
from processes import X, answer_of_a_child, compiled, hits
from amber_compile import last_reports
torch.set_num_threads(1)

"""

OPTIONS: dict[str, object] = {"correction": None}
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
HIT = {"autograd_cache_hit": 1, "autograd_cache_miss": 0, "fxgraph_cache_miss": 0}
MISS = {"autograd_cache_hit": 0, "autograd_cache_miss": 1, "fxgraph_cache_hit": 0}


@torch.no_grad()
def compiled(**inductor: object) -> Tensor:
    """Compile a model anew by ``backend="amber"`` and return what it computes."""
    torch._dynamo.reset()
    counters.clear()
    options = OPTIONS | {"inductor": inductor}
    result: Tensor = torch.compile(Stack(), backend="amber", options=options)(X)
    return result


def hits() -> dict[str, int]:
    """Return how often the caches of graphs were hit and missed since the last compilation."""
    found = {**counters["inductor"], **counters["aot_autograd"]}
    names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "autograd_cache_hit", "autograd_cache_miss")
    return {name: found.get(name, 0) for name in names}


def run_script(source: str, *arguments: str, cache: Path | None = None) -> Any:
    """Run Python source and return what it prints, with Inductor's cache in folder ``cache``."""
    path = os.pathsep.join(map(str, (Path(__file__).parent, TESTS / "models", *sys.path)))
    environment = os.environ | {"PYTHONPATH": path}
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"  # dearer than one kernel
        environment["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # as are trials of each instruction set
    done = subprocess.run(
        [sys.executable, "-c", HEADER + textwrap.dedent(source), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def answer_of_a_child(work: Callable[[], Any]) -> Any:
    """Return what ``work()`` gives in a forked process; None if that fails or hangs."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writes, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writes)
    answered, _, _ = select.select([reads], [], [], 20)
    if not answered:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(os.read(reads, 1 << 16) or "null") if answered else None
