"""The compiled callable that a backend returns: it adds what is derived from the weights.

    run(*arguments)  =  compiled(*arguments, *derived(weights among the arguments))

The derived tensors are looked up again when a weight was replaced or written to. Layers compiled
one by one share one graph but need not share a plan: each distinct set of decisions has a compiled
*variant*, and the weights of the call choose it. Weights that no variant is for, and weights that
have no factor any more (one became infinite), run the dense graph, uncompiled, with a warning; if
the values of one were released (release.py), that is an error. Weights are held weakly.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from .derivations import Derivation, Names
from .derived import derive, epoch, storage_of, version, written
from .errors import OptionError, PlanError
from .locking import lock
from .release import read, refuse_released, release
from .shards import is_fake

Compiled = Callable[..., Any]
Weights = Sequence[torch.Tensor]

_expired = cast("Callable[[int], bool]", torch.UntypedStorage._expired)
_address: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr


@dataclass(frozen=True, slots=True)
class Derived:
    """An appended input: what ``request`` makes of the weight at argument ``position``."""

    position: int
    request: Derivation


@dataclass(frozen=True, slots=True)
class Release:
    """A weight to be released when its codes are there.

    Attributes:
        position: of its argument.
        also: what is derived from it before.
        tell: is called with why it keeps its values, or None.
    """

    position: int
    also: tuple[Derivation, ...]
    tell: Callable[[str | None], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a graph, and the inputs that it has beyond the graph's own.

    Attributes:
        compiled: what runs.
        derived: its further inputs.
        reads: argument positions of the weights whose values it reads.
        releases: weights whose values nobody reads.
    """

    compiled: Compiled
    derived: tuple[Derived, ...] = ()
    reads: tuple[int, ...] = ()
    releases: tuple[Release, ...] = ()

    def at(self, names: Names) -> Variant:
        """Return the same graph for the projections of other names."""
        moved = [Derived(one.position, one.request.at(names)) for one in self.derived]
        return replace(self, derived=tuple(moved))


@dataclass(frozen=True, slots=True)
class _Bound:
    """What one set of weights runs, as long as the stamps of its scored weights stay the same.

    Attributes:
        scored: argument positions of the weights that something was derived from.
        stamps: theirs.
        compiled: what runs.
        tensors: its further inputs.
        storages: handles of the storages of the scored weights: one that expired may have left its
            address to another.
        held: keeps the handles valid, and ends this entry when a weight dies.
        sources: what the stamps are of, if some weight is spread over processes or gathered from
            what is; the weights themselves otherwise.
    """

    scored: tuple[int, ...]
    stamps: list[int]
    compiled: Compiled
    tensors: tuple[torch.Tensor, ...]
    storages: tuple[int, ...] = ()
    held: tuple[object, ...] = ()
    sources: tuple[weakref.ref[torch.Tensor], ...] = ()

    def stamped(self, arguments: Sequence[Any]) -> Weights:
        """Return the tensors whose stamps to compare; fewer if one is gone."""
        if not self.sources:
            return [arguments[at] for at in self.scored]
        return [tensor for one in self.sources if (tensor := one()) is not None]


class Binding:
    """Call a compiled graph with its weight-derived inputs appended.

    Args:
        watched: argument positions of the weights that tell which variant runs.
        choose: from those weights to their variant, or None if there is none.
        dense: what runs where no variant can: the graph as Dynamo traced it.
    """

    def __init__(
        self,
        watched: Sequence[int],
        choose: Callable[[Weights], Variant | None],
        dense: Compiled,
    ) -> None:
        self._watched = tuple(watched)
        self._choose = choose
        self._dense = dense
        self._bound: dict[tuple[int, ...], _Bound] = {}

    def __call__(self, *arguments: Any) -> Any:
        key = tuple([id(arguments[at]) for at in self._watched])
        bound = self._bound.get(key)
        if (
            bound is None
            or any(map(_expired, bound.storages))
            or bound.stamps != _stamps(bound.stamped(arguments))
        ):
            bound = self._bind(key, arguments)
        return bound.compiled(*arguments, *bound.tensors)

    def _bind(self, key: tuple[int, ...], arguments: Sequence[Any]) -> _Bound:
        weights = [arguments[at] for at in self._watched]
        with lock:
            variant = self._choose(weights)
            if variant is None:  # not remembered: the model may be registered later
                refuse_released(arguments)
                return _Bound((), [], self._dense, ())
            read([arguments[at] for at in variant.reads], self)
            positions = dict.fromkeys(one.position for one in variant.derived)
            scored = tuple([at for at in positions if not is_fake(arguments[at])])
            watched = [one for at in scored for one in written(arguments[at])]
            # before anything is derived: what is written meanwhile, the next call sees
            stamps = _stamps(watched)
            storages = list(map(storage_of, watched))
            compiled, tensors = self._inputs_of(variant, arguments)
            handles = tuple([storage.cdata for storage in storages])
            forget = _Forget(weakref.ref(self), key)
            held = (*storages, *[weakref.ref(weight, forget) for weight in weights])
            is_plain = all(map(operator.is_, watched, [arguments[at] for at in scored]))
            sources = () if is_plain else tuple(map(weakref.ref, watched))
            bound = _Bound(scored, stamps, compiled, tensors, handles, held, sources)
            self._bound[key] = bound
            return bound

    def _inputs_of(
        self, variant: Variant, arguments: Sequence[Any]
    ) -> tuple[Compiled, tuple[torch.Tensor, ...]]:
        try:
            tensors = _derive_and_release(variant, arguments)
        except (OptionError, PlanError) as cause:
            refuse_released(arguments)
            warnings.warn(
                f"amber: the dense graph runs, uncompiled, until its weights change: {cause}",
                stacklevel=2,
            )
            return self._dense, ()
        return variant.compiled, tensors

    def forget(self, key: tuple[int, ...]) -> None:
        """Drop what one set of weights was bound to: one of them is gone."""
        self._bound.pop(key, None)


def _derive_and_release(variant: Variant, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Return a variant's further inputs; release each weight before the next has codes."""
    tensors: dict[Derived, torch.Tensor] = {}
    releases = {one.position: one for one in variant.releases}
    for at in dict.fromkeys(one.position for one in variant.derived):
        own = [one for one in variant.derived if one.position == at]
        tensors |= {one: derive(arguments[at], one.request) for one in own}
        if at in releases and not is_fake(arguments[at]):
            releases[at].tell(release(arguments[at], releases[at].also))
    return tuple([tensors[one] for one in variant.derived])


@dataclass(frozen=True, slots=True)
class _Forget:
    """Called when a weight dies; holds its binding weakly, so that neither keeps the other."""

    binding: weakref.ref[Binding]
    key: tuple[int, ...]

    def __call__(self, _: weakref.ref[torch.Tensor]) -> None:
        binding = self.binding()
        if binding is not None:
            binding.forget(self.key)


def _stamps(weights: Weights) -> list[int]:
    """Return what changes when a weight was written to: fast, for it runs on every call."""
    try:
        stamps = [weight._version for weight in weights]
    except RuntimeError:  # an inference tensor counts no versions
        stamps = [version(weight) for weight in weights]
    stamps += map(_address, weights)
    stamps.append(epoch())
    return stamps
