"""Inductor reads what it is lent, and does not write its own results there."""

import pytest
import torch
from stack import Stack, sparse
from torch import nn
from torch._inductor.virtualized import V
from torch.fx import Graph

from amber_compile import AmberConfig
from amber_compile.derivations import ScoreFactor
from amber_compile.derived import derive
from amber_compile.integrations import inductor, shared_tensors
from amber_compile.integrations.inductor import AmberPass, chain

WIDTH = 64
X = torch.randn(1, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
CONFIG = AmberConfig(correction=None)


class Reduced(nn.Module):
    """A projection, and behind it a result of just the size of its factor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down_proj(x)
        return torch.cumsum(y.square().sum(-1), -1).flip(-1)


def factors_of_two_calls(model: Reduced) -> list[torch.Tensor]:
    """Return what is kept of the weight after each of two calls."""
    compiled = torch.compile(model, options={inductor.HOOKS[0]: AmberPass(CONFIG)})
    found = []
    for _ in range(2):
        compiled(X)
        kept = derive(model.down_proj.weight, ScoreFactor("weight_norm"), look=False)
        found.append(kept.clone())
    return found


@pytest.fixture
def uncached(inductor: None):
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield


@torch.no_grad()
def test_what_is_looked_up_stays_as_it_is(uncached: None) -> None:
    model = Reduced()
    factor = ScoreFactor("weight_norm").compute(model.down_proj.weight)
    for kept in factors_of_two_calls(model):
        assert torch.equal(kept, factor)


@torch.no_grad()
@pytest.mark.parametrize("known", [False, True])
def test_it_is_lent_and_its_memory_is_never_given_away(
    uncached: None, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Also where Inductor has met the operator before, in a graph that copies."""
    from torch._inductor import lowering

    operator = torch.ops.amber.derive.default
    monkeypatch.delitem(lowering.lowerings, operator, raising=False)
    if known:
        monkeypatch.setitem(lowering.lowerings, operator, lowering.fallback_handler(operator))
    lent: list[object] = []
    protected: list[int] = []

    def look(graph: Graph) -> None:
        calls = graph.find_nodes(op="call_function", target=torch.ops.amber.derive.default)
        lent.extend(call.args[2] for call in calls)

    def scheduled(nodes: list[object]) -> list[object]:
        protected.append(len(V.graph.never_reuse_buffers))
        return nodes

    model, x = Stack(), X[:, :8]
    options = {inductor.HOOKS[0]: chain(AmberPass(CONFIG), look)}
    with torch._inductor.config.patch(_post_fusion_custom_pass=scheduled):
        assert torch.equal(torch.compile(model, options=options)(x), sparse(model, x))
    assert lent == [False] * 4
    assert protected == [4]


def test_it_is_registered_once() -> None:
    from torch._inductor import lowering

    shared_tensors.share_with_inductor()
    registered = lowering.lowerings[torch.ops.amber.derive.default]
    shared_tensors.share_with_inductor()
    assert lowering.lowerings[torch.ops.amber.derive.default] is registered
