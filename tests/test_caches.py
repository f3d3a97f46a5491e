"""PyTorch's caches on disk: hit by a second process, never by another version of Amber."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from stack import Stack, sparse
from torch._dynamo.utils import counters

from amber_compile import last_reports

OPTIONS = {"correction": None}
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))

PROCESS = """
import json, torch
from stack import Stack
from test_caches import compiled, hits
from amber_compile import last_reports

compiled(backend="amber")
report = last_reports()[0].to_json()
del report["graphs"][0]["seconds"]
print(json.dumps({"hits": hits(), "report": report}))
"""


@torch.no_grad()
def compiled(backend: str, tokens: int = 8, seed: int = 0) -> torch.Tensor:
    """Compile a model anew and return what it computes."""
    torch._dynamo.reset()
    counters.clear()
    options = OPTIONS if backend == "amber" else None
    return torch.compile(Stack(seed), backend=backend, options=options)(X[:, :tokens])


def hits() -> dict[str, int]:
    """Return how often the caches of graphs were hit and missed since the last compilation."""
    found = {**counters["inductor"], **counters["aot_autograd"]}
    names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "autograd_cache_hit", "autograd_cache_miss")
    return {name: found.get(name, 0) for name in names}


HIT = {"autograd_cache_hit": 1, "autograd_cache_miss": 0, "fxgraph_cache_miss": 0}
MISS = {"autograd_cache_hit": 0, "autograd_cache_miss": 1, "fxgraph_cache_hit": 0}


def in_a_process(cache: Path) -> Mapping[str, Any]:
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here / "models", *sys.path)))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        check=True,
    )
    result: Mapping[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_a_second_process_finds_the_graph_and_reports_the_same(tmp_path: Path) -> None:
    first, second = in_a_process(tmp_path), in_a_process(tmp_path)
    assert first["hits"].items() >= MISS.items()
    assert second["hits"].items() >= HIT.items()
    assert first["report"] == second["report"]
    assert first["report"]["coverage"] > 0


def test_another_version_of_amber_finds_nothing_of_this_one(
    inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compiled("amber")
    assert torch.equal(compiled("amber"), result)
    assert hits().items() >= HIT.items()
    monkeypatch.setattr("amber_compile.inductor.source_hash", lambda: uuid4().hex)
    assert torch.equal(compiled("amber"), result)
    assert hits().items() >= MISS.items()


def test_a_graph_that_amber_leaves_alone_is_shared_with_the_dense_backend(inductor: None) -> None:
    result = compiled("inductor", tokens=1)
    assert torch.equal(compiled("amber", tokens=1), result)
    assert hits().items() >= HIT.items()
    assert last_reports()[0].graphs[0].phase == "decode"


def test_a_warm_cache_keeps_to_the_weights_of_the_call(inductor: None) -> None:
    for seed in (0, 1):
        assert torch.equal(compiled("amber", seed=seed), sparse(Stack(seed), X))
    assert hits().items() >= HIT.items()
