"""Weights that FSDP2 gathers for each forward pass (``fully_shard``), and where they come from.

    layer.q_proj.weight     between passes: a DTensor, of which each process holds a part
                            while the layer runs: a plain parameter, the whole weight

The whole one is the same object in every pass, in memory that is given back in between, and FSDP
writes to it unseen: neither its address nor its version tells whether its values changed. So what
follows from it is kept, and named, for the parameter that it is gathered from: its *source*.

PyTorch has no public way from the one to the other: the states that ``fully_shard`` leaves for
modules are searched, once for each weight. A weight that is in none is its own source.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

_found: MutableMapping[torch.Tensor, Callable[[], Any] | None] = WeakIdKeyDictionary()
"""For each weight that was searched for, FSDP's record of it, weakly; None if it has none."""


def source_of(weight: torch.Tensor) -> torch.Tensor:
    """Return the parameter that ``weight`` is gathered from, or itself."""
    if weight not in _found:
        _found[weight] = next(
            (weakref.ref(one) for one in _records() if _gathered(one) is weight), None
        )
    found = _found[weight]
    record = found() if found is not None else None
    source: torch.Tensor = weight if record is None else record.sharded_param
    return source


def _records() -> Iterator[Any]:
    """Yield FSDP's record of each parameter of this process."""
    fsdp = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    if fsdp is None:  # nobody has imported it, so nobody uses it
        return
    from torch.distributed._composable_state import _module_state_mapping

    for held in list(_module_state_mapping.values()):
        state = held()
        if isinstance(state, fsdp.FSDPState):
            for group in _groups(state):
                yield from group.fsdp_params


def _groups(state: Any) -> list[Any]:
    """Return the groups of parameters of a state: one or none before PyTorch 2.13."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _gathered(record: Any) -> torch.Tensor | None:
    """Return the whole parameter; None before the first pass."""
    return getattr(record, "_unsharded_param", None)
