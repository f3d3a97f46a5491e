"""The operator ``amber::derive``: what follows from a weight, looked up while a graph runs.

    factor = derive(weight, '{"is":"ScoreFactor","score":"weight_norm",...}')

For graphs that cannot be given further inputs: those of a pass in somebody else's pipeline. The
tensor is computed once per weight and again after the weight was written to (derived.py), as for
the backend, and kept as long as the weight lives: no graph holds it. What comes out is a copy, for
a compiler may reuse the memory of what an operator returns; without ``copy`` it is lent to one that
was told not to.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .derived import derive as look_up
from .kernels.registration import LIBRARY, define
from .locking import lock
from .request_text import from_text

# ---- reference -----------------------------------------------------------------------------------


def derive_reference(weight: torch.Tensor, request: str, copy: bool = True) -> torch.Tensor:
    """Compute what ``request`` makes of ``weight``: the definition of the operator.

    Without ``copy`` the answer is shared, to be read only.

    Raises:
        OptionError: if the weight has none, for it is not finite.
        PlanError: if it is a tensor of a plan that is not loaded or lacks it.
    """
    return from_text(request).compute(weight).clone()


# ---- look-up -------------------------------------------------------------------------------------


_kept: MutableMapping[torch.Tensor, dict[str, torch.Tensor]] = WeakIdKeyDictionary()


def _derive(weight: torch.Tensor, request: str, copy: bool = True) -> torch.Tensor:
    tensor = look_up(weight, from_text(request), look=False)
    with lock:
        _kept.setdefault(weight, {})[request] = tensor
    return tensor.clone() if copy else tensor


# ---- operator ------------------------------------------------------------------------------------


def _fake(weight: torch.Tensor, request: str, copy: bool = True) -> torch.Tensor:
    return from_text(request).like(weight)


# A replayed CUDA graph would look nothing up: what it found while it was recorded may be stale.
derive = define(
    "derive(Tensor weight, str request, bool copy=True) -> Tensor",
    derive_reference,
    _fake,
    torch.Tag.cudagraph_unsafe,
)

LIBRARY.impl("derive", _derive, "CPU")
LIBRARY.impl("derive", _derive, "CUDA")
