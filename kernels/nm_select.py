"""Keep the N best of every M consecutive channels of each token.

    key  = |x · factor| in fp32                  y = x where rank(key) < n, +0 elsewhere
    y    = round(y · scale)                      scale = 1 without a correction

Of two channels of a group the larger key is better: NaN above infinity above finite, all NaN
alike, -0 = +0. Of two equal keys the lower channel is better. So the answer is unique, and what is
kept is kept bit for bit. For float64 "fp32" reads "float64" throughout.

    correction        scale, per token
    norm              sqrt((‖x‖² + ε) / (‖y‖² + ε))
    variance          sqrt((Var x + ε) / (Var y + ε)), over all channels, zeros included

ε = 1e-30 lies far below the energy of any activation and far above the denormals; it stands above
the line too, so that a vanishing token gets scale 1 (and zeros stay zeros) rather than scale 0. A
token whose scale is not finite (it has an infinity, a NaN, or squares that overflow) gets scale 1.

Copied unchanged: the first ``dense_prefix`` positions of a sequence (dimension -2), and all of
``x`` when it has fewer than ``min_tokens`` tokens. The latter is decided here, at run time, because
a symbolic token count can then stay free of guards.
"""

from __future__ import annotations

import torch

from amber_compile.kernels.arguments import check_selection
from amber_compile.kernels.registration import define

EPSILON = 1e-30

# ---- reference -----------------------------------------------------------------------------------


def nm_select_reference(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
) -> torch.Tensor:
    """Select in plain tensor operations, on any device: the definition of the operator."""
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens)
    if tokens(x) < min_tokens:
        return x.clone(memory_format=torch.contiguous_format)
    kept = torch.where(_best(_keys(x, factor), n, m), x, 0).contiguous()
    if correction is not None:
        kept = (kept.to(_precision(x)) * _scale(x, kept, correction)).to(x.dtype)
    if dense_prefix and x.dim() == 1:
        kept.copy_(x)
    elif dense_prefix:
        kept[..., :dense_prefix, :] = x[..., :dense_prefix, :]
    return kept


def tokens(x: torch.Tensor) -> int:
    """Return the number of tokens of ``x`` [..., channels]."""
    return x.shape[:-1].numel()


def _precision(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _keys(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return integers that order like the scores: their bits, every NaN being the largest."""
    scores = x.to(_precision(x))
    if factor is not None:
        scores = scores * factor
    scores = scores.abs()
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    return scores.view(integer).masked_fill(scores.isnan(), torch.iinfo(integer).max)


def _best(keys: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mark the ``n`` largest of every ``m`` keys; a stable sort prefers the lower channel."""
    groups = keys.view(*keys.shape[:-1], keys.shape[-1] // m, m)
    places = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True).flatten(-2)


def _scale(x: torch.Tensor, kept: torch.Tensor, correction: str) -> torch.Tensor:
    """Return the factor [..., 1] that gives the kept values the energy of ``x``."""
    before, after = (_energy(value.to(_precision(x)), correction) for value in (x, kept))
    scale = ((before + EPSILON) / (after + EPSILON)).sqrt()
    return scale.where(scale.isfinite(), 1)


def _energy(x: torch.Tensor, correction: str) -> torch.Tensor:
    if correction == "variance":
        return (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return x.square().sum(-1, keepdim=True)


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


nm_select = define(
    "nm_select(Tensor x, Tensor? factor, int n, int m, str? correction=None, "
    "int dense_prefix=0, int min_tokens=0) -> Tensor",
    nm_select_reference,
    _fake,
)
