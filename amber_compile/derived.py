"""Keep the tensors that follow from a weight: computed once, shared by all graphs that read them.

A tensor is valid for one *stamp* of its weight: identity, storage address and version counter. An
in-place write, ``load_state_dict``, an optimiser step or a new parameter changes the stamp. Writes
behind PyTorch's back do not (``p.data.add_``, fused optimisers, NumPy views): ``refresh(model)``.
Weights are held weakly; so are the larger tensors, which a compiled graph holds while it needs
them. A fake weight has no values: what follows from it is fake as well, and never kept. A weight
whose values were released (release.py) has what was kept of it, and what follows from that.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, MutableMapping

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from .derivations import Derivation
from .errors import ReleasedError
from .rebuild import rebuilt
from .stand_in import is_released

Stamp = tuple[int, int]
Held = Callable[[], torch.Tensor | None]

_lock = threading.RLock()
_derived: MutableMapping[torch.Tensor, dict[Derivation, tuple[Stamp, Held]]]
_derived = WeakIdKeyDictionary()
_epoch = 0


def stamp(weight: torch.Tensor) -> Stamp:
    """Return what changes when PyTorch sees ``weight`` change."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def epoch() -> int:
    """Return the number of calls of :func:`refresh` so far."""
    return _epoch


def derive(weight: torch.Tensor, derivation: Derivation) -> torch.Tensor:
    """Return the tensor that ``derivation`` makes of ``weight``, the same while it is valid.

    Raises:
        OptionError: if the weight has none, for it is not finite.
        PlanError: if it is a tensor that the plan lacks.
        ReleasedError: if the weight has no values any more, and it does not follow from the codes.
    """
    if isinstance(weight, FakeTensor):
        return derivation.like(weight)
    with _lock:
        known = _derived.setdefault(weight, {})
        now = stamp(weight)
        then, held = known.get(derivation, (None, _nothing))
        tensor = held() if then == now else None
        if tensor is None:
            # not in inference mode: the tensor is an input of other modes' graphs too
            with torch.inference_mode(False), torch.no_grad():
                tensor = _made(weight, derivation)
            known[derivation] = now, _hold(tensor, derivation.lasting)
        return tensor


def kept(weight: torch.Tensor, *, written: bool = False) -> dict[Derivation, torch.Tensor]:
    """Return what is kept of ``weight`` as it is now, or as it was before it was ``written`` to."""
    with _lock:
        now = stamp(weight)
        every = _derived.get(weight, {}).items()
        held = [(one, hold()) for one, (then, hold) in every if then == now or written]
        return {one: tensor for one, tensor in held if tensor is not None}


def move(
    weight: torch.Tensor, change: Callable[[], None], lasting: Iterable[Derivation] = ()
) -> None:
    """Let ``change`` give ``weight`` other storage; what follows from it stays what it was.

    ``lasting`` is from now on kept as long as the weight lives.
    """
    with _lock:
        known, firm = kept(weight, written=is_released(weight)), set(lasting)
        change()
        now = stamp(weight)
        _derived[weight] = {
            one: (now, _hold(tensor, one.lasting or one in firm)) for one, tensor in known.items()
        }


def _made(weight: torch.Tensor, derivation: Derivation) -> torch.Tensor:
    """Compute what follows from ``weight``."""
    if not is_released(weight):
        return derivation.compute(weight)
    tensor = rebuilt(weight, derivation, kept(weight))
    if tensor is None:
        raise ReleasedError(
            f"the values of a weight {list(weight.shape)} were released (decode=), and since it "
            f"was written to, or the options are others, its codes do not tell {derivation}. Call "
            "amber_compile.restore(model) first, then load weights or compile with other options"
        )
    return tensor


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
            if not is_released(weight):  # of one that is, nothing else is left
                _derived.pop(weight, None)
        _epoch += 1


def _nothing() -> None:
    return None


def _hold(tensor: torch.Tensor, lasting: bool) -> Held:
    return (lambda: tensor) if lasting else weakref.ref(tensor)
