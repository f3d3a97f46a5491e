"""A weight of its own for prefill: what the dropped channels say, read off the kept ones.

    minimise  ‖X Wᵀ - X_s W*ᵀ‖² + λ ‖W* - W‖²        X, X_s: inputs, and what is kept of them
    W* = W + W M (G + λ I)⁻¹                         G = Σ x_s x_sᵀ,  M = Σ (x - x_s) x_sᵀ

λ is a share of the mean of G's diagonal. (The idea of DuoGPT, arXiv 2506.20194, for N:M; there W is
sparse as well.) The inputs are those of the dense model: each site repairs its own selection only.
With the sparse model's inputs and the dense one's outputs, all sites at once, the model gets worse
(docs/decisions.md). Least squares shrink an output, so α and β want to be fitted after it
(output.py), and tuned (tuning.py).

The answer costs a second copy of the weight, in the model's type. Decode keeps W. Two matrices
[K, K] of float64 are held for each site that is fitted at a time; where all would take more than
``memory`` bytes the text is read several times. Experts, and gates that are one half of a fused
product, keep their weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .observe import Call, observing
from .reading import Batches, Reader
from .selection import Sparse, selection
from .statistics import Statistics

DAMPING = 0.1
GRAMS = ("gram", "missing")


def fit_weights(
    reader: Reader,
    weights: Mapping[str, Tensor],
    case: Mapping[str, Sparse],
    batches: Batches,
    memory: int,
    damping: float = DAMPING,
    stage: str = "weights",
) -> dict[str, Sparse]:
    """Return the sparse sites of ``case`` with weights for prefill.

    Args:
        reader: of the model.
        weights: of the sites (observe.py).
        case: the sparse sites as they are before.
        batches: to read, of all ranks.
        memory: bytes that the matrices [K, K] may take; one site is fitted even if it needs more.
        damping: λ, as a share of the mean of G's diagonal.
        stage: name of the passes, for the files that keep their progress.
    """
    found = dict(case)
    for at, names in enumerate(_shares(weights, case, memory)):
        own = {name: weights[name] for name in names}
        grams = _Grams(reader, own, case)
        held = reader.read(f"{stage} {at}", batches, grams, "weights")
        for name in grams.used:
            found[name] = _updated(case[name], grams.used[name], held.of(name), damping)
    return found


def _updated(sparse: Sparse, weight: Tensor, sums: Mapping[str, Tensor], damping: float) -> Sparse:
    """Return ``sparse`` with the weight that is fitted from ``sums``, in the plan's order."""
    fitted = ridge_weight(weight, sums["gram"], sums["missing"], damping).to(weight.dtype)
    if sparse.settings.permuted:
        fitted = fitted[:, sparse.tensors["permutation"].long().to(fitted.device)]
    settings = replace(sparse.settings, updated_weight=True)
    return Sparse(settings, {**sparse.tensors, "weight": fitted})


def add_grams(into: Statistics, site: str, x: Tensor, kept: Tensor) -> None:
    """Add what a weight is fitted from: inputs ``x`` [T, K], and what is kept of them."""
    x, kept = x.float(), kept.float()
    into.add(site, "gram", kept.T @ kept)
    into.add(site, "missing", (x - kept).T @ kept)


def ridge_weight(weight: Tensor, gram: Tensor, missing: Tensor, damping: float = DAMPING) -> Tensor:
    """Return W* for ``weight`` [N, K], float64, from the sums of :func:`add_grams`."""
    wide = weight.to(gram)
    strength = damping * gram.diagonal().mean()
    if not strength > 0:
        return wide  # nothing was kept: nothing is known
    damped = gram + strength * torch.eye(len(gram)).to(gram)
    factor = torch.linalg.cholesky(damped)
    return wide + torch.cholesky_solve((wide @ missing).T, factor).T


def _shares(
    weights: Mapping[str, Tensor], case: Mapping[str, Sparse], memory: int
) -> Iterator[list[str]]:
    """Yield the sites that are fitted together."""
    names: list[str] = []
    taken = 0
    for name in case:
        weight = weights[name]
        if weight.dim() != 2 or case[name].settings.part:
            continue
        needed = max(weight.shape) ** 2 * 8 * len(GRAMS)  # at most: K is one of the two
        if names and taken + needed > memory:
            yield names
            names, taken = [], 0
        names.append(name)
        taken += needed
    if names:
        yield names


class _Grams:
    """The visit of a batch that adds up both matrices of some sites, dense inputs all."""

    def __init__(
        self, reader: Reader, weights: Mapping[str, Tensor], case: Mapping[str, Sparse]
    ) -> None:
        self._reader, self._weights, self._case = reader, weights, case
        self.used: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, number: int, batch: Any, into: Statistics) -> None:
        def visit(call: Call) -> Tensor:
            self.used[call.name] = call.weight
            kept = selection(call, self._case[call.name])
            add_grams(into, call.name, call.rows, kept.reshape(call.rows.shape))
            return call()

        with observing(self._weights, visit):
            self._reader(batch)
