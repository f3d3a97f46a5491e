"""A language model of two tiny layers, exported with a dynamic sequence length.

With ``mixed`` the second layer is bfloat16, so that one program has both types.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, MIDDLE, HEADS = 96, 64, 128, 4
LENGTHS = (32, 2, 77)


class Layer(nn.Module):
    """Attention and a gated MLP, with the usual names of projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_proj = nn.Linear(WIDTH, MIDDLE, bias=False)
        self.up_proj = nn.Linear(WIDTH, MIDDLE, bias=False)
        self.down_proj = nn.Linear(MIDDLE, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in heads)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


class Model(nn.Module):
    """Token ids [B, S] to logits [B, S, vocabulary]."""

    def __init__(self, dtype: torch.dtype = torch.float32, mixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        last = torch.bfloat16 if mixed else dtype
        self.layers = nn.ModuleList([Layer().to(dtype), Layer().to(last)])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=last)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x.to(layer.q_proj.weight.dtype))
        return self.lm_head(x)


def prompts() -> list[Tensor]:
    """Return token ids [1, S] of several lengths."""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (1, length), generator=random) for length in LENGTHS]


@torch.no_grad()
def exported(model: nn.Module) -> torch.export.ExportedProgram:
    """Export ``model`` with any sequence length from 2 to 512."""
    length = torch.export.Dim("length", min=2, max=512)
    return torch.export.export(model, (prompts()[0],), dynamic_shapes=({1: length},))


@contextmanager
def torch_warnings() -> Iterator[None]:
    """Let PyTorch warn of itself: 2.13 when a program is copied, 2.11 when it is loaded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        yield
