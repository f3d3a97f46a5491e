"""Apply a projection to the N best of every M input channels.

    y = linear(nm_select(x, factor, n, m, …), weight, bias)

One operator for the whole projection: a device with a sparse matrix unit takes it over whole,
compressing what it selects. Elsewhere the selection is followed by the dense product.
"""

from __future__ import annotations

import torch

from amber_compile.kernels.arguments import check_projection, check_selection
from amber_compile.kernels.nm_select import nm_select
from amber_compile.kernels.registration import define

# ---- reference -----------------------------------------------------------------------------------


def nm_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
) -> torch.Tensor:
    """Select, then multiply: [..., K], [N, K] -> [..., N]."""
    kept = nm_select(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    return torch.nn.functional.linear(kept, weight, bias)


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


nm_linear = define(
    "nm_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? factor, int n, int m, "
    "str? correction=None, int dense_prefix=0, int min_tokens=0) -> Tensor",
    nm_linear_reference,
    _fake,
)
