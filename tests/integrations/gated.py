"""A gated layer like a decoder's MLP, and what the workers of several tests do with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import amber_compile
from amber_compile.report import clear_reports

WIDTH, INNER = 32, 96
ALL = {"projections": ["*"], "score": "robust_norm"}


class Gated(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))) of x [B, S, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Layers(nn.Module):
    """Gated layers one after the other, as a decoder names them."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give ``model`` float64 weights whose columns differ in norm; the same for the same seed."""
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), new_values(model, seed), strict=True):
            parameter.data = values
    return model.eval()


def new_values(model: nn.Module, seed: int) -> list[Tensor]:
    """Return values for the parameters of ``model``."""
    drawn = torch.Generator().manual_seed(seed)
    return [
        torch.randn(one.shape, generator=drawn, dtype=torch.float64)
        * torch.linspace(0.2, 2, one.shape[-1], dtype=torch.float64)
        / one.shape[-1] ** 0.5
        for one in model.parameters()
    ]


def tokens(seed: int = 1, length: int = 9) -> Tensor:
    """Return activations [2, length, WIDTH]."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, WIDTH, generator=drawn, dtype=torch.float64)


def fresh() -> None:
    """Forget compiled graphs and reports."""
    torch._dynamo.reset()
    clear_reports()


def compiled(model: nn.Module, options: Mapping[str, Any], backend: str = "amber_eager") -> Any:
    """Compile ``model`` as one graph."""
    model.compile(backend=backend, options=dict(options), fullgraph=True)
    return model


def decisions() -> dict[str, str]:
    """Return ``{site: how, or why not}`` of all graphs since :func:`fresh`."""
    sites = [site for report in amber_compile.last_reports() for site in report.sites]
    return {site.name: str(site.decision) for site in reversed(sites)}  # of prefill, not of decode


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by rounding only.

    Sums in another order differ in the last bits of a type; a channel chosen otherwise shows in the
    first. Half of the bits tell them apart.
    """
    bound = torch.finfo(other.dtype).eps ** 0.5
    return bool((one - other).abs().max() <= bound * other.abs().max())
