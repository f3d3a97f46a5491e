"""Keep the tensors that follow from a weight: computed once, shared by all graphs that read them.

A tensor is valid for one *stamp* of its weight: identity, storage, address and version counter (of
a ``DTensor`` also those of this process's part; of what FSDP gathers, those of its source). An
in-place write, ``load_state_dict``, an optimiser step or a new parameter changes the stamp. Writes
behind PyTorch's back do not (``p.data.add_``, fused optimisers, NumPy views): ``refresh(model)``.
A *fingerprint* of the values tells them to a graph that is compiled or bound afterwards, as for a
merged LoRA adapter; a graph that has its tensors already does not ask again.
Weights are held weakly; so are the larger tensors, which a compiled graph holds while it needs
them. A fake weight has no values: what follows from it is fake as well, and never kept. A weight
whose values were released (release.py) has what was kept of it, and what follows from that.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, MutableMapping

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from .derivations import Derivation
from .errors import ReleasedError
from .fingerprint import fingerprint
from .gathered import source_of
from .locking import lock
from .rebuild import rebuilt
from .shards import compute, is_fake, is_sharded, like, local_of
from .stand_in import is_released

Stamp = tuple[tuple[int, int, StorageWeakRef], ...]
Content = tuple[Stamp, int]
Held = Callable[[], torch.Tensor | None]

_derived: MutableMapping[torch.Tensor, dict[Derivation, tuple[Content, Held]]]
_derived = WeakIdKeyDictionary()
_epoch = 0


def stamp(weight: torch.Tensor) -> Stamp:
    """Return what changes when PyTorch sees ``weight`` change."""
    return tuple([(one.data_ptr(), version(one), storage_of(one)) for one in written(weight)])


def version(tensor: torch.Tensor) -> int:
    """Return the version counter of ``tensor``; 0 of an inference tensor, which counts none."""
    return 0 if tensor.is_inference() else tensor._version


def written(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors whose stamps tell whether ``weight`` was written to."""
    source = source_of(weight)
    return (source, local_of(source)) if is_sharded(source) else (source,)


def storage_of(weight: torch.Tensor) -> StorageWeakRef:
    """Return a reference to the storage of ``weight``: equal to that of no storage made later."""
    return StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]  # as it is


def _content(weight: torch.Tensor) -> Content:
    """Return the stamp of ``weight`` and a fingerprint of its values."""
    return stamp(weight), fingerprint(weight)


def epoch() -> int:
    """Return the number of calls of :func:`refresh` so far."""
    return _epoch


def derive(weight: torch.Tensor, derivation: Derivation, *, look: bool = True) -> torch.Tensor:
    """Return the tensor that ``derivation`` makes of ``weight``, the same while it is valid.

    ``look`` at the values too, for writes that PyTorch did not see: not in every call of a graph.

    Raises:
        OptionError: if the weight has none, for it is not finite.
        PlanError: if it is a tensor that the plan lacks.
        ReleasedError: if the weight has no values any more, and it does not follow from the codes.
    """
    if is_fake(weight):
        return like(weight, derivation)
    with lock:
        known = _derived.setdefault(source_of(weight), {})
        then, held = known.get(derivation, (None, _nothing))
        valid = then is not None and then[0] == stamp(weight)
        tensor = held() if valid and not (look and then != _content(weight)) else None
        if tensor is None:
            now = _content(weight)
            # not in inference mode: the tensor is an input of other modes' graphs too
            with torch.inference_mode(False), torch.no_grad():
                tensor = _made(weight, derivation)
            known[derivation] = now, _hold(tensor, derivation.lasting)
        return tensor


def kept(weight: torch.Tensor, *, written: bool = False) -> dict[Derivation, torch.Tensor]:
    """Return what is kept of ``weight`` as it is now, or as it was before it was ``written`` to."""
    with lock:
        now = _content(weight)
        every = _derived.get(weight, {}).items()
        held = [(one, hold()) for one, (then, hold) in every if then == now or written]
        return {one: tensor for one, tensor in held if tensor is not None}


def move(
    weight: torch.Tensor, change: Callable[[], None], lasting: Iterable[Derivation] = ()
) -> None:
    """Let ``change`` give ``weight`` other storage; what follows from it stays what it was.

    ``lasting`` is from now on kept as long as the weight lives.
    """
    with lock:
        known, firm = kept(weight, written=is_released(weight)), set(lasting)
        change()
        now = _content(weight)
        _derived[weight] = {
            one: (now, _hold(tensor, one.lasting or one in firm)) for one, tensor in known.items()
        }


def _made(weight: torch.Tensor, derivation: Derivation) -> torch.Tensor:
    """Compute what follows from ``weight``."""
    if not is_released(weight):
        return compute(weight, derivation)
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
    with lock:
        for weight in itertools.chain(model.parameters(), model.buffers()):
            if not is_released(weight):  # of one that is, nothing else is left
                _derived.pop(source_of(weight), None)
        _epoch += 1


def _nothing() -> None:
    return None


def _hold(tensor: torch.Tensor, lasting: bool) -> Held:
    return (lambda: tensor) if lasting else weakref.ref(tensor)
