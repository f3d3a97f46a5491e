"""How far two outputs of one model lie apart.

    relative    ‖a - b‖₂ / ‖a‖₂            over the logits if the model has some, else all tensors
    largest     max |a - b|                the same
    kl          mean over tokens of KL(softmax a ‖ softmax b), in nats              logits only
    top1        share of tokens whose likeliest next token is the same              logits only

``a`` is the dense output. Where both are the same infinity, or both NaN, nothing differs: masks are
full of infinities. Where ``b`` alone is not finite, the error is not finite either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

CHUNK = 1 << 24
"""Elements that are compared at a time: float64 copies of all logits would be gigabytes."""


@dataclass(frozen=True)
class OutputError:
    """The error of a model's output; ``kl`` and ``top1`` are None for a model without logits."""

    relative: float
    largest: float
    kl: float | None = None
    top1: float | None = None

    def to_json(self) -> dict[str, float | str | None]:
        """Return the errors as plain JSON values, of which infinity and NaN are none."""
        return {name: number(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        parts = [f"relative l2 {self.relative:.4g}", f"largest difference {self.largest:.4g}"]
        if self.kl is not None and self.top1 is not None:
            parts += [f"KL {self.kl:.4g} nats a token", f"top-1 agreement {self.top1:.2%}"]
        return ", ".join(parts)


def output_error(expected: Any, actual: Any) -> OutputError:
    """Compare the dense output of a model with another one of the same structure."""
    logits = _logits(expected), _logits(actual)
    if logits[0] is None or logits[1] is None:
        a, b = tree_leaves(expected), tree_leaves(actual)
        return OutputError(relative_error(a, b), _largest(a, b))
    a, b = [logits[0]], [logits[1]]
    return OutputError(relative_error(a, b), _largest(a, b), *_likelihoods(a[0], b[0]))


def relative_error(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    """Return ‖expected - actual‖ / ‖expected‖ over the floating-point tensors of two lists."""
    difference = size = 0.0
    for a, b in _pieces(expected, actual):
        difference += float(_difference(a, b).square().sum())
        size += float(a.where(a.isfinite(), 0).square().sum())
    return (difference / size) ** 0.5 if size else math.inf if difference else 0.0


def worse(one: float, other: float | None) -> float:
    """Return the larger error; one that is not a number is larger than any."""
    if other is None or math.isnan(one):
        return one
    return other if math.isnan(other) else max(one, other)


def level(error: float | None) -> float:
    """Return an error as a number to sort by: NaN as infinity, none as less than zero."""
    if error is None:
        return -1.0
    return math.inf if math.isnan(error) else error


def number(value: float | None) -> float | str | None:
    """Return what JSON has for ``value``: it knows neither infinity nor NaN."""
    return value if value is None or math.isfinite(value) else str(value)


def _largest(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    largest = 0.0
    for a, b in _pieces(expected, actual):
        if a.numel():
            largest = worse(float(_difference(a, b).abs().max()), largest)
    return largest


def _pieces(expected: Sequence[Any], actual: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield corresponding parts of the floating-point tensors, in float64."""
    for a, b in zip(expected, actual, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            parts = (torch.split(value.detach().flatten(), CHUNK) for value in (a, b))
            for pair in zip(*parts, strict=True):
                yield pair[0].double(), pair[1].double()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, a - b)


def _logits(output: Any) -> Tensor | None:
    """Return ``output.logits`` or ``output["logits"]``, where there are some."""
    found = output.get("logits") if isinstance(output, Mapping) else None
    found = found if found is not None else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _likelihoods(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return KL and top-1 agreement of logits [..., vocabulary]."""
    rows = max(1, CHUNK // a.shape[-1])
    divergence = agreed = 0.0
    parts = (torch.split(value.detach().flatten(0, -2), rows) for value in (a, b))
    for one, other in zip(*parts, strict=True):
        p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        terms = (p.exp() * (p - q)).where(p > -math.inf, 0)  # a token ruled out by both
        divergence += float(terms.sum(dtype=torch.float64))
        agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
    tokens = a.shape[:-1].numel()
    return (divergence / tokens, agreed / tokens) if tokens else (0.0, 1.0)
