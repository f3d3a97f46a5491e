"""Tensors derived from a weight: computed once per weight, shared by all graphs that read it.

A factor is valid for one *stamp* of its weight: identity, storage address and version counter. An
in-place write, ``load_state_dict``, an optimiser step or a new parameter changes the stamp. Writes
behind PyTorch's back do not (``p.data.add_``, fused optimisers, NumPy views): ``refresh(model)``.
Weights are held weakly. A fake weight has no values: its factor is fake as well, and never kept.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import MutableMapping

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from .scores import SCORES

Stamp = tuple[int, int]
Key = tuple[str, bool, int | None]
"""A score, whether the weight is stored transposed, and how many leading rows (None: all)."""

_lock = threading.RLock()
_factors: MutableMapping[torch.Tensor, dict[Key, tuple[Stamp, torch.Tensor]]]
_factors = WeakIdKeyDictionary()
_epoch = 0


def stamp(weight: torch.Tensor) -> Stamp:
    """Return what changes when PyTorch sees ``weight`` change."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def epoch() -> int:
    """Return the number of calls of :func:`refresh` so far."""
    return _epoch


def score_factor(
    weight: torch.Tensor, score: str, transposed: bool = False, rows: int | None = None
) -> torch.Tensor:
    """Return the factor of ``weight`` under ``score``, from the cache if it is still valid.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``; ``[K, N]`` or ``[E, K, N]`` if ``transposed``.
        score: a key of :data:`amber_compile.scores.SCORES` that has a factor.
        transposed: how the weight is stored.
        rows: take only the first so many of the N rows: the gate of a fused projection.

    Returns:
        fp32 ``[K]``, or ``[E, K]`` with one factor per expert.
    """
    if isinstance(weight, FakeTensor):
        shape = (*weight.shape[:-2], weight.shape[-2 if transposed else -1])
        return weight.new_empty(shape, dtype=torch.float32, requires_grad=False)
    with _lock:
        known = _factors.setdefault(weight, {})
        now = stamp(weight)
        key = score, transposed, rows
        held = known.get(key)
        if held is None or held[0] != now:
            held = now, _compute(weight, *key)
            known[key] = held
        return held[1]


def refresh(model: torch.nn.Module) -> None:
    """Forget what was derived from the weights of ``model``: they were changed unnoticed.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    global _epoch
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"refresh takes a torch.nn.Module, not {type(model).__name__}")
    with _lock:
        for weight in itertools.chain(model.parameters(), model.buffers()):
            _factors.pop(weight, None)
        _epoch += 1


def _compute(weight: torch.Tensor, score: str, transposed: bool, rows: int | None) -> torch.Tensor:
    """Compute a factor outside inference mode: its result is an input of other modes' graphs."""
    function = SCORES[score]
    assert function is not None, f"score {score!r} has no factor"
    with torch.inference_mode(False), torch.no_grad():
        matrix = weight.detach().transpose(-1, -2) if transposed else weight.detach()
        matrix = matrix[..., :rows, :]
        if matrix.dim() == 3:
            return torch.stack([function(expert) for expert in matrix])
        return function(matrix)
