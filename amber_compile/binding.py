"""The compiled callable that a backend returns: it adds what is derived from the weights.

    run(*arguments)  =  compiled(*arguments, *derived(weights among the arguments))

The derived tensors are looked up again when a weight was replaced or written to. Layers compiled
one by one share one graph but need not share a plan: each distinct set of decisions has a compiled
*variant*, and the weights of the call choose it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .derived import Key, epoch, score_factor, stamp

Compiled = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Derived:
    """An appended input: the factor, under ``key``, of the weight at argument ``position``."""

    position: int
    key: Key


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a graph, and the inputs that it has beyond the graph's own."""

    compiled: Compiled
    derived: tuple[Derived, ...] = ()


@dataclass(frozen=True, slots=True)
class _Bound:
    """A variant, the derived tensors of one set of weights, and the stamps they are valid for."""

    stamps: list[int]
    compiled: Compiled
    tensors: tuple[torch.Tensor, ...]


class Binding:
    """Call a compiled graph with its weight-derived inputs appended.

    Args:
        watched: argument positions of the weights that anything was derived from or decided by.
        choose: from those weights to the variant they run.
    """

    def __init__(
        self, watched: Sequence[int], choose: Callable[[list[torch.Tensor]], Variant]
    ) -> None:
        self._watched = tuple(watched)
        self._choose = choose
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        weights = [arguments[at] for at in self._watched]
        key = tuple(map(id, weights))
        bound = self._bound.get(key)
        if bound is None or bound.stamps != _stamps(weights):
            bound = self._bind(key, arguments, weights)
        return bound.compiled(*arguments, *bound.tensors)

    def _bind(
        self, key: tuple[int, ...], arguments: Sequence[Any], weights: list[torch.Tensor]
    ) -> _Bound:
        with self._lock:
            variant = self._choose(weights)
            stamps = _stamps(weights)
            tensors = tuple(
                score_factor(arguments[one.position], *one.key) for one in variant.derived
            )
            bound = _Bound(stamps, variant.compiled, tensors)
            if key not in self._bound:
                for weight in weights:
                    weakref.finalize(weight, self._bound.pop, key, None)
            self._bound[key] = bound
            return bound


def _stamps(weights: list[torch.Tensor]) -> list[int]:
    """Return what changes when a weight was written to: fast, for it runs on every call."""
    try:
        stamps = [weight._version for weight in weights]
    except RuntimeError:  # an inference tensor counts no versions
        stamps = [stamp(weight)[1] for weight in weights]
    stamps += [weight.data_ptr() for weight in weights]
    stamps.append(epoch())
    return stamps
