"""What the programs of these tests are made of: tensors, settings, and the pass under them."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.fx import GraphModule

from amber_compile import Decision, Pattern, Settings
from amber_compile.decision import dense, sparse
from amber_compile.passes import Sparsified, decide, find_projections, sparsify_projections

X = torch.randn(2, 4, 16)
Y = torch.randn(2, 4, 16)
W, Q, K = (nn.Parameter(torch.randn(rows, 16)) for rows in (8, 8, 4))
KN = nn.Parameter(torch.randn(16, 8))
SQUARE = nn.Parameter(torch.randn(16, 16))
B = nn.Parameter(torch.randn(8))

PLAIN = Settings(Pattern(2, 4), "magnitude")
NORM = Settings(Pattern(2, 4), "weight_norm")
GATE = Settings(Pattern(2, 4), "magnitude", part="gate")
PREFIX = Settings(Pattern(2, 4), "magnitude", dense_prefix=1)


def sparsify(
    *settings: Settings | str, min_rows: Sequence[int] | None = None
) -> Callable[[GraphModule], Sparsified]:
    """Return the pass under which projection ``i`` gets ``settings[i]``, or the only ones."""

    def run(gm: GraphModule) -> Sparsified:
        found = find_projections(gm)
        chosen = settings * len(found) if len(settings) == 1 else settings
        decided = zip(found, map(_decision, chosen), strict=True)
        return sparsify_projections(gm, list(decided), min_rows)

    return run


def _decision(choice: Settings | str) -> Decision:
    return dense(choice) if isinstance(choice, str) else sparse(choice)


def rewrite_all(choice: Settings) -> Callable[[GraphModule], Sparsified]:
    """Return the pass that decides each projection itself, as the backend does."""

    def run(gm: GraphModule) -> Sparsified:
        decided = [(one, decide(one, "prefill", lambda _: choice)) for one in find_projections(gm)]
        return sparsify_projections(gm, decided)

    return run


def silu_and_multiply(y: torch.Tensor) -> torch.Tensor:
    """Return what a gated MLP makes of its fused gate and up projection."""
    gate, up = y.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up
