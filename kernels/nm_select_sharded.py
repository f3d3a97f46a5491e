"""Select from the channels that one process has, and rescale by the energies of all channels.

    kept = nm_select(x, factor, n, m)            x [..., K / R] on each of R processes
    y    = round(kept · scale)                   scale of nm_select.py, over all K channels

No group of M is cut between two processes, so each selects what one process with all channels
would. Only the scale needs the others:

    correction        summed over the processes of ``group``, per token
    norm              Σ x², Σ kept²
    variance          Σ x², Σ kept², Σ x, Σ kept

one all-reduce of two or four float64 numbers a token, which every process of the group must call.
The scale is that of one process but for rounding; tokens that are copied unchanged
(``dense_prefix``, ``min_tokens``) have equal sums and so scale 1.

A composite of other operators: a compiler sees ``nm_select``, arithmetic and the all-reduce.
"""

from __future__ import annotations

import torch

from amber_compile.kernels.nm_select import EPSILON, nm_select
from amber_compile.kernels.registration import LIBRARY, TAGS

# ---- reference -----------------------------------------------------------------------------------


def nm_select_sharded_reference(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str,
    dense_prefix: int,
    min_tokens: int,
    offsets: torch.Tensor | None,
    channels: int,
    group: str,
) -> torch.Tensor:
    """Select from a slice of ``channels`` on each process of ``group``."""
    kept = nm_select(x, factor, n, m, None, dense_prefix, min_tokens, offsets)
    sums = _over_all(torch.cat([_sums(one, correction) for one in (x, kept)], -1), group)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    # rounded before the division: a sum that overflows there has no finite scale
    before, after = (_spread(own, channels).to(precision) for own in sums.tensor_split(2, -1))
    scale = ((before / channels + EPSILON) / (after / channels + EPSILON)).sqrt()
    return (kept.to(precision) * scale.where(scale.isfinite(), 1)).to(x.dtype)


def _sums(x: torch.Tensor, correction: str) -> torch.Tensor:
    """Return Σ x², and Σ x if the variance is asked for, of each token: float64 [..., 1 or 2]."""
    x = x.double()
    squares = x.square().sum(-1, keepdim=True)
    return squares if correction == "norm" else torch.cat([squares, x.sum(-1, keepdim=True)], -1)


def _over_all(sums: torch.Tensor, group: str) -> torch.Tensor:
    """Return the sums over the processes of ``group``."""
    functional = torch.ops._c10d_functional
    total: torch.Tensor = functional.wait_tensor(functional.all_reduce(sums, "sum", group))
    return total


def _spread(sums: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the sum of squares, about the mean if Σ x is known: float64 [..., 1]."""
    if sums.shape[-1] == 1:
        return sums
    return (sums[..., :1] - sums[..., 1:].square() / channels).clamp(min=0)


# ---- operator ------------------------------------------------------------------------------------

LIBRARY.define(
    "nm_select_sharded(Tensor x, Tensor? factor, int n, int m, str correction, int dense_prefix, "
    "int min_tokens, Tensor? offsets, int channels, str group) -> Tensor",
    tags=TAGS,
)
LIBRARY.impl("nm_select_sharded", nm_select_sharded_reference, "CompositeImplicitAutograd")
nm_select_sharded = torch.ops.amber.nm_select_sharded.default
