"""PyTorch's caches: carried to another machine, shared through a server, switched off."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from processes import HIT, MISS, OPTIONS, X, compiled, hits, run_script
from stack import Stack, sparse
from torch import Tensor, nn

from amber_compile import last_reports

PLAIN = {"cpp.simdlen": 1}  # compiles faster than vector code
RESULT = """
report = last_reports()[0].to_json()
del report["graphs"][0]["seconds"], report["graphs"][0]["code_files"]
answer = {"hits": hits(), "report": report, "result": result.tolist()}
"""
SAVE = f"""
result = compiled(**{PLAIN})
{RESULT}
artifacts, _ = torch.compiler.save_cache_artifacts()
open(sys.argv[1], "wb").write(artifacts)
print(json.dumps(answer))
"""
LOAD = f"""
torch.compiler.load_cache_artifacts(open(sys.argv[1], "rb").read())
result = compiled(**{PLAIN})
{RESULT}
print(json.dumps(answer))
"""


# ---- artifacts ----


@pytest.mark.slow
def test_artifacts_of_one_process_serve_another_with_an_empty_cache(tmp_path: Path) -> None:
    file = str(tmp_path / "artifacts")
    first = run_script(SAVE, file, cache=tmp_path / "first")
    second = run_script(LOAD, file, cache=tmp_path / "second")
    assert first["hits"].items() >= MISS.items()
    assert second["hits"].items() >= HIT.items()
    assert second["result"] == first["result"] == sparse(Stack(), X).tolist()
    assert second["report"] == first["report"]
    assert first["report"]["coverage"] > 0


# ---- caches on and off ----


@pytest.fixture
def empty_cache(inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a version of Amber that no cache knows: an empty folder would build headers anew."""
    version = uuid4().hex
    monkeypatch.setattr("amber_compile.inductor.source_hash", lambda: version)


def test_the_graph_cache_may_be_off(empty_cache: None) -> None:
    for _ in range(2):
        assert torch.equal(compiled(fx_graph_cache=False), sparse(Stack(), X))
        assert not any(hits().values())


def test_the_bundled_cache_finds_the_graph(empty_cache: None) -> None:
    """In it one entry holds a graph with its code: what PyTorch itself ships to other machines."""
    with torch._functorch.config.patch(bundled_autograd_cache=True):
        for expected in (MISS, HIT):
            assert torch.equal(compiled(), sparse(Stack(), X))
            assert hits().items() >= expected.items()


# ---- a cache on a server ----


@pytest.fixture
def server(empty_cache: None) -> Iterator[None]:
    """Put PyTorch's own stand-in where its client of a Redis server would be."""
    from torch._inductor.mock_cache import PatchCaches

    PatchCaches.setUp()
    local = {"enable_autograd_cache": False, "enable_remote_autograd_cache": False}
    with (
        PatchCaches(),
        torch._inductor.config.patch(fx_graph_remote_cache=True),
        torch._functorch.config.patch(local),
    ):
        yield
    PatchCaches.tearDown()


def test_a_graph_goes_to_the_server_once_and_comes_back(
    server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.mock_cache import Stats, global_stats

    for hit in (0, 1):
        assert torch.equal(compiled(), sparse(Stack(), X))
        assert hits()["fxgraph_cache_hit"] == hit
        assert global_stats.fx_graph == Stats(num_put=1, num_get_hit=hit, num_get_miss=1)
    monkeypatch.setattr("amber_compile.inductor.source_hash", lambda: uuid4().hex)
    assert torch.equal(compiled(), sparse(Stack(), X))
    assert global_stats.fx_graph == Stats(num_put=2, num_get_hit=1, num_get_miss=2)


# ---- layers compiled one by one ----


class Four(nn.Module):
    """Four layers that share one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*Stack(0).layers, *Stack(1).layers])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_layers_compiled_one_by_one_are_one_entry_that_a_new_model_finds(empty_cache: None) -> None:
    from torch._dynamo.utils import counters

    for expected in (MISS, HIT):
        torch._dynamo.reset()
        counters.clear()
        model = Four()
        for layer in model.layers:
            layer.compile(backend="amber", options=OPTIONS)
        expected_result = sparse(Stack(1), sparse(Stack(0), X))
        assert torch.equal(model(X), expected_result)
        assert hits().items() >= expected.items()
    assert len(last_reports()) == 2
