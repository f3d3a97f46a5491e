"""What a quantised model should compute, written a second time for eager mode.

    with quantized(model, ["model.layers.0.mlp.down_proj"]):
        logits = model(**inputs).logits

Independent of the package on purpose: a function mode instead of graphs, float64 instead of integer
kernels (it holds every sum of products of two bytes exactly). Every value is rounded where the
operators' definitions round it, so that a compiled model can be asked for the same bits. Calls with
one token a sequence (decode) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


@contextmanager
def quantized(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Quantise the named projections of ``model`` to int8 while the context lasts."""
    modules = dict(model.named_modules())
    with _Mode({id(modules[name].get_parameter("weight")) for name in names}):
        yield model


class _Mode(TorchFunctionMode):
    """Replaces products with the weights of some modules, or with halves of them."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if function is torch._C._nn.linear and self._is_quantized(args[1]):
            x, weight, bias = (*args, *kwargs.values(), None)[:3]
            return product(x, weight, bias)
        if function is torch.addmm and self._is_quantized(args[2]):
            bias, x, weight = args
            return product(x, weight.T, bias)
        if function in MATMULS and self._is_quantized(args[1]):
            return product(args[0], args[1].T, None)
        return function(*args, **kwargs)

    def _is_quantized(self, weight: Tensor) -> bool:
        owner = weight if weight._base is None else weight._base
        return id(owner) in self._weights


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by W8A8, with a scale a token and a scale an output."""
    codes, scale = rows(x)
    weight_codes, weight_scale = rows(weight.detach())
    y = (codes.double() @ weight_codes.double().T).float() * scale * weight_scale[:, 0]
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of the rows of ``x[..., K]``, as numbers, and their scales ``[..., 1]``."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126)
    return (x * (1 / scale)).round().clamp(-127, 127), scale
