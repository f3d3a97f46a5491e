"""Scale and shift a sparse site's output so that each channel has the mean and spread it had dense.

    α = √(Var y / Var y_s)        β = mean y - α mean y_s             for each output channel

y and y_s are outputs for the same inputs, those of the dense model, so each site repairs its own
selection only. The idea is that of the variance correction (arXiv 2509.22166) and of SPON's output
bias (arXiv 2512.12744), here in the epilogue: no token is looked at when the model runs. It is what
there is without tuning, and where tuning (tuning.py) starts.

Not least squares: y_s = y + error makes the slope of y over y_s smaller than 1, so every site would
shrink its signal, and the model gets worse than without (docs/decisions.md). A weight that was
fitted by least squares (ridge.py) shrinks its outputs as well; α gives them their size back.

Experts, and gates that are one half of a fused product, have no α.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .observe import Call, observing
from .reading import Batches, Reader
from .selection import Sparse, sparse_product
from .statistics import Statistics

CONSTANT = 1e-12
"""Of a variance to a mean square: what is less is rounding."""


def fit_outputs(
    reader: Reader,
    weights: Mapping[str, Tensor],
    case: Mapping[str, Sparse],
    batches: Batches,
    stage: str = "outputs",
) -> dict[str, Sparse]:
    """Return the sparse sites of ``case``, which have no α and β yet, with them.

    Args:
        reader: of the model.
        weights: of the sites (observe.py).
        case: the sparse sites as they are before.
        batches: to read, of all ranks.
        stage: name of the pass, for the file that keeps its progress.
    """
    own = {name: weights[name] for name in case if not case[name].settings.part}

    @torch.no_grad()
    def visit(number: int, batch: Any, into: Statistics) -> None:
        def look(call: Call) -> Tensor:
            y = call()
            if call.weight.dim() == 2:
                add_output(into, call.name, y, sparse_product(call, case[call.name]))
            return y

        with observing(own, look):
            reader(batch)

    held = reader.read(stage, batches, visit, "outputs")
    return {name: _corrected(sparse, held.of(name)) for name, sparse in case.items()}


def add_output(into: Statistics, site: str, y: Tensor, sparse: Tensor) -> None:
    """Add what α and β are fitted from: outputs [..., N], dense and sparse."""
    into.add(site, "output.rows", torch.tensor(float(y.shape[:-1].numel())))
    rows = [value.reshape(-1, value.shape[-1]).double() for value in (y, sparse)]
    sums = [one for value in rows for one in (value.sum(0), value.square().sum(0))]
    into.add(site, "output.sums", torch.stack(sums))


def output_correction(rows: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return α and β, fp32 [N], from the sums of :func:`add_output`.

    An output that is constant, dense or sparse, is shifted only.
    """
    y, square, sparse, sparse_square = sums / rows
    spread, left = square - y.square(), sparse_square - sparse.square()
    known = (spread > CONSTANT * square) & (left > CONSTANT * sparse_square)
    scale = torch.where(known, (spread / left.where(known, 1)).clamp(min=0).sqrt(), 1)
    return scale.float(), (y - scale * sparse).float()


def _corrected(sparse: Sparse, sums: Mapping[str, Tensor]) -> Sparse:
    if "output.rows" not in sums:
        return sparse
    scale, bias = output_correction(sums["output.rows"], sums["output.sums"])
    settings = replace(sparse.settings, output_scale=True, output_bias=True)
    return Sparse(settings, {**sparse.tensors, "output_scale": scale, "output_bias": bias})
