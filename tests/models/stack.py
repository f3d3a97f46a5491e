"""Layers of three projections and nothing else: the smallest model that the rule sparsifies.

    gate, up = W_gate x, W_up x;   x = x + W_down (relu(gate) · up)

Every operation rounds once, so two compilers must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from emulate import Settings, prune
from torch import Tensor, nn

WIDTH, MIDDLE = 64, 96


class Layer(nn.Module):
    """A gated MLP with the projections' usual names, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, MIDDLE, bias=False)
        self.up_proj = nn.Linear(WIDTH, MIDDLE, bias=False)
        self.down_proj = nn.Linear(MIDDLE, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


class Stack(nn.Module):
    """Two layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def sparse(
    stack: Stack, x: Tensor, dense: Collection[str] = (), settings: Settings | None = None
) -> Tensor:
    """Return what ``stack`` computes when all but its up projections and ``dense`` are sparse."""
    settings = settings or Settings(2, 4)

    def read(name: str, x: Tensor) -> Tensor:
        weight = stack.get_submodule(name).weight
        if name not in dense:
            x = prune(x, weight, torch.arange(x.shape[-2]), settings)
        return nn.functional.linear(x, weight)

    for at, layer in enumerate(stack.layers):
        middle = read(f"layers.{at}.gate_proj", x).relu() * layer.up_proj(x)
        x = x + read(f"layers.{at}.down_proj", middle)
    return x
