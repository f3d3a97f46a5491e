"""A fused gate and up projection, however its halves are taken apart: the gate alone is pruned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulate import Settings, project_halves, prune
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from amber_compile import last_reports

WIDTH, MIDDLE = 32, 24
X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
Halves = Callable[[Tensor], tuple[Tensor, ...]]
SPELLINGS: dict[str, Halves] = {
    "chunk": lambda y: y.chunk(2, dim=-1),
    "split": lambda y: y.split(MIDDLE, dim=-1),
    "split with sizes": lambda y: torch.split(y, [MIDDLE, MIDDLE], 2),
    "slices": lambda y: (y[..., :MIDDLE], y[..., MIDDLE:]),
    "slices of every dimension": lambda y: (y[:, :, :MIDDLE], y[:, :, MIDDLE:]),
    "negative slices": lambda y: (y[..., :-MIDDLE], y[..., -MIDDLE:]),
    "narrow": lambda y: (y.narrow(-1, 0, MIDDLE), y.narrow(2, MIDDLE, MIDDLE)),
}
OTHERS: dict[str, Halves] = {
    "interleaved": lambda y: (y[..., ::2], y[..., 1::2]),
    "up first": lambda y: y.chunk(2, dim=-1)[::-1],
    "halves of the sequence": lambda y: y.chunk(2, dim=1),
    "overlapping": lambda y: (y[..., :MIDDLE], y[..., MIDDLE - 8 : -8]),
    "the same twice": lambda y: (y[..., :MIDDLE], y[..., :MIDDLE]),
    "a half and a part of it": lambda y: (y[..., :MIDDLE], y[..., MIDDLE:][..., :1]),
}


class Fused(nn.Module):
    """The first half of a gated MLP. ReLU rounds nothing, so that layouts make no difference."""

    def __init__(self, halves: Halves, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = nn.Linear(WIDTH, 2 * MIDDLE, bias)
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.halves(self.gate_up_proj(x))
        return relu(gate) * up


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_the_gate_half_is_pruned(spelling: str, bias: bool) -> None:
    module = Fused(SPELLINGS[spelling], bias)
    actual = torch.compile(module, backend="amber_eager", options={"preset": "paper"})(X)
    weight, settings = module.gate_up_proj.weight, Settings(2, 4, "robust_norm", part="gate")
    position = torch.arange(X.shape[1])
    halves = project_halves(X, weight, module.gate_up_proj.bias, position, settings)
    gate, up = halves.split(MIDDLE, dim=-1)
    assert torch.equal(actual, relu(gate) * up)
    [site] = last_reports()[0].sites
    assert (site.share, site.decision.settings.part) == (0.5, "gate")


@pytest.mark.parametrize("spelling", OTHERS)
@torch.no_grad()
def test_what_is_no_gate_half_stays_dense(spelling: str) -> None:
    module = Fused(OTHERS[spelling], bias=True)
    actual = torch.compile(module, backend="amber_eager")(X)
    assert torch.equal(actual, module(X))
    [site] = last_reports()[0].sites
    assert "the graph does not show where they part" in site.decision.reason


@torch.no_grad()
def test_listed_by_name_both_halves_are_pruned() -> None:
    module = Fused(SPELLINGS["chunk"], bias=False)
    options = {"preset": "paper", "projections": "*.gate_up_proj"}
    actual = torch.compile(module, backend="amber_eager", options=options)(X)
    position = torch.arange(X.shape[1])
    pruned = prune(X, module.gate_up_proj.weight, position, Settings(2, 4, "robust_norm"))
    gate, up = linear(pruned, module.gate_up_proj.weight).chunk(2, dim=-1)
    assert torch.equal(actual, relu(gate) * up)
