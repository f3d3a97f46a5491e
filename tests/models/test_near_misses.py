"""Multiplications that look like a projection's, or hide one: none is touched, each is explained.

All under ``projections="*"``, where everything that could be sparsified would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.compiler import nested_compile_region
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from amber_compile import Report, last_reports

WIDTH = 32
X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
NESTED = "it lies inside a nested graph"
COMPUTED = "its weight is computed from a parameter"
HIDDEN = "does not show which dimension is contracted"
LEFT = "its weight is the left operand"
STACK = "its weight is a stack of matrices"
PICKED = "its weight is taken out of a stack of matrices"


class Reading(nn.Module):
    """A module with some parameters and modules, whose forward is a function of it and ``x``."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], **parts: tuple[int, ...] | nn.Module):
        super().__init__()
        self.read = read
        for name, part in parts.items():
            is_shape = isinstance(part, tuple)
            setattr(self, name, nn.Parameter(torch.randn(part)) if is_shape else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


@dataclass(frozen=True)
class Miss:
    """What makes the module, what it reads, and its sites with what their reasons contain."""

    make: Callable[[], nn.Module]
    sites: dict[str, str] = field(default_factory=dict)
    x: Tensor = X


def reading(
    read: Callable[[Any, Tensor], Tensor],
    sites: dict[str, str],
    **parts: tuple[int, ...] | nn.Module,
) -> Miss:
    """Return a miss of a ``Reading``."""
    return Miss(lambda: Reading(read, **parts), sites)


class Region(nn.Module):
    """A layer that PyTorch compiles once, for all layers of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, WIDTH)

    @nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(x).relu()


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def attention() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True)


SQUARE, EXPERTS = (WIDTH, WIDTH), (2, WIDTH, WIDTH)
IDS = torch.arange(16).view(2, 8)
ENDS = torch.tensor([8, 16], dtype=torch.int32)
MISSES = {
    # no weight meets an activation
    "attention": reading(lambda _, x: (x @ x.mT).softmax(-1) @ x, {}),
    "fused attention": reading(lambda _, x: functional.scaled_dot_product_attention(x, x, x), {}),
    "batched attention": reading(lambda _, x: torch.baddbmm(x @ x.mT, x, x.mT), {}),
    "embedding": Miss(lambda: nn.Embedding(WIDTH, WIDTH), {}, IDS),
    "norm": Miss(lambda: nn.RMSNorm(WIDTH)),
    "convolution": Miss(lambda: nn.Conv1d(8, 8, 1)),
    "vector": reading(lambda one, x: x @ one.w, {}, w=(WIDTH,)),
    "two parameters": reading(
        lambda one, x: x + functional.linear(one.q, one.w), {}, q=(8, WIDTH), w=SQUARE
    ),
    # the weight is computed
    "weight norm": Miss(
        lambda: weight_norm(linear()), {"parametrizations.weight.original1": COMPUTED}
    ),
    "masked": reading(
        lambda one, x: functional.linear(x, one.w * one.mask),
        {"w": COMPUTED},
        w=SQUARE,
        mask=SQUARE,
    ),
    "sliced": reading(lambda one, x: functional.linear(x, one.w[:16]), {"w": COMPUTED}, w=SQUARE),
    "reshaped": reading(lambda one, x: x @ one.w.view(WIDTH, -1), {"w": COMPUTED}, w=(8, 128)),
    "joined": reading(
        lambda one, x: functional.linear(x, torch.cat([one.q, one.k])),
        {"q": COMPUTED},
        q=SQUARE,
        k=SQUARE,
    ),
    "merged": reading(
        lambda one, x: functional.linear(x, one.w + one.b @ one.a),
        {"w": COMPUTED},
        w=SQUARE,
        a=(8, WIDTH),
        b=(WIDTH, 8),
    ),
    # an operation multiplies without showing its operands
    "einsum": reading(
        lambda one, x: torch.einsum("bsk,nk->bsn", x, one.w), {"w": HIDDEN}, w=SQUARE
    ),
    "tensordot": reading(lambda one, x: torch.tensordot(x, one.w, 1), {"w": HIDDEN}, w=SQUARE),
    "inner": reading(lambda one, x: torch.inner(x, one.w), {"w": HIDDEN}, w=SQUARE),
    "bilinear": reading(
        lambda one, x: one.mix(x, x), {"mix": HIDDEN}, mix=nn.Bilinear(WIDTH, WIDTH, 8)
    ),
    "fused self attention": reading(
        lambda one, x: one.attn(x, x, x)[0],
        {"attn.in_proj_weight": HIDDEN, "attn.out_proj": HIDDEN},
        attn=attention(),
    ),
    "fused cross attention": reading(
        lambda one, x: one.attn(x[:, :4], x, x)[0],
        {"attn.in_proj_weight": HIDDEN, "attn.out_proj": HIDDEN},
        attn=attention(),
    ),
    "fused layer": Miss(
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True).eval(),
        dict.fromkeys(
            ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"], HIDDEN
        ),
    ),
    # channels are not the last dimension of x, or rows meet different weights
    "weight first": reading(lambda one, x: one.w @ x.mT, {"w": LEFT}, w=SQUARE),
    "weight first, as many tokens as channels": Miss(
        lambda: Reading(lambda one, x: one.w @ x, w=SQUARE), {"w": LEFT}, X.repeat(1, 4, 1)
    ),
    "weight gathered for each row": reading(
        lambda one, x: torch.bmm(one.w[IDS[:, 0] % 2], x.mT), {"w": LEFT}, w=EXPERTS
    ),
    "weight gathered, row first": reading(
        lambda one, x: torch.bmm(x, one.w[IDS[:, 0] % 2]), {"w": PICKED}, w=EXPERTS
    ),
    "experts in another order": Miss(
        lambda: Reading(
            lambda one, x: torch._grouped_mm(x, one.w[IDS[0, :2].flip(0)].mT, offs=ENDS), w=EXPERTS
        ).bfloat16(),
        {"w": PICKED},
        X.flatten(0, 1).bfloat16(),
    ),
    "an expert for each sequence": reading(
        lambda one, x: torch.bmm(x, one.w), {"w": STACK}, w=EXPERTS
    ),
    "one expert": reading(lambda one, x: functional.linear(x, one.w[1]), {"w": PICKED}, w=EXPERTS),
    # the matmul lies in a graph of its own
    "checkpoint": reading(
        lambda one, x: checkpoint(one.up, x, use_reentrant=False), {"up": NESTED}, up=linear()
    ),
    "condition": reading(
        lambda one, x: torch.cond(x.sum() > 0, lambda x: x @ one.w, lambda x: x @ one.v, (x,)),
        {"w": NESTED, "v": NESTED},
        w=SQUARE,
        v=SQUARE,
    ),
    "compiled regions": Miss(
        lambda: nn.Sequential(Region(), Region(), Region()),
        {f"{at}.up_proj": NESTED for at in range(3)},
    ),
    # the pattern does not fit
    "channels": Miss(
        lambda: nn.Sequential(nn.Linear(30, WIDTH)),
        {"0": "K = 30 is not a multiple of M = 4"},
        torch.randn(2, 8, 30),
    ),
}


@pytest.mark.parametrize("name", MISSES)
@torch.no_grad()
def test_near_miss_stays_dense_with_its_reason(name: str) -> None:
    torch.manual_seed(0)
    miss = MISSES[name]
    module = miss.make()
    compiled = torch.compile(module, backend="amber_eager", options={"projections": "*"})
    assert torch.equal(compiled(miss.x), module(miss.x))
    sites = {site.name: site.decision for site in Report.merge(last_reports()).sites}
    assert sites.keys() == miss.sites.keys()
    for site, reason in miss.sites.items():
        assert sites[site].obstacle
        assert reason in sites[site].reason


class Adapted(nn.Module):
    """What LoRA makes of a linear: ``y = W x + B A x``."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = linear()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, WIDTH, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@torch.no_grad()
def test_an_adapter_stays_dense_and_what_it_adapts_is_what_it_was() -> None:
    module = Reading(
        lambda one, x: one.q_proj(x) * one.k_proj(x), q_proj=Adapted(), k_proj=Adapted()
    )
    torch.compile(module, backend="amber_eager")(X)
    sites = {site.name: str(site.decision) for site in Report.merge(last_reports()).sites}
    small = "dense: rule: adapters are small and stay dense"
    assert sites == {
        "q_proj": "2:4, weight_norm, norm correction",
        "q_proj.lora_A.default": small,
        "q_proj.lora_B.default": small,
        "k_proj": "dense: rule: k_proj stays dense",
        "k_proj.lora_A.default": small,
        "k_proj.lora_B.default": small,
    }


@torch.no_grad()
def test_a_deep_residual_stream_takes_no_time() -> None:
    """64 sums of a value with itself: 2^64 ways lead back from the projection to its input."""

    def read(one: Any, x: Tensor) -> Tensor:
        for _ in range(64):
            x = x + x
        return functional.linear(x, one.w)

    torch.compile(Reading(read, w=SQUARE), backend="amber_eager", options={"projections": "*"})(X)
    [site] = last_reports()[0].sites
    assert site.decision.sparse
