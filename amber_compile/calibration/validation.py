"""How far the whole model moves under several choices of sparse sites, on the same batches.

    dense answer of a batch, once;   then each case:   mean distance of a token (answers.py)

With one site a case this is the sensitivity by direct substitution: exact, at one forward pass for
each site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .answers import Answer
from .observe import Call, observing
from .reading import Batches, Reader
from .selection import Sparse, sparse_product
from .statistics import Statistics

Case = Mapping[str, Sparse]
"""The sparse sites of a model; the others are dense."""


@dataclass(frozen=True)
class Distance:
    """A mean over tokens, with its standard error over batches."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


def distances(
    reader: Reader,
    weights: Mapping[str, Tensor],
    cases: Mapping[str, Case],
    batches: Batches,
    stage: str,
    label: str,
) -> dict[str, Distance]:
    """Return the distance of each case from the dense model, a token, over ``batches``."""

    def visit(number: int, batch: Any, into: Statistics) -> None:
        with torch.no_grad():
            dense = Answer(reader(batch), batch)
            for name, case in cases.items():
                own = {site: weights[site] for site in case}
                with observing(own, partial(_answer, case)):
                    moved = dense.distances(Answer(reader(batch), batch))
                tokens, total = torch.tensor(float(moved.numel())), moved.sum()
                terms = torch.stack([tokens, total, total * total, tokens * total, tokens * tokens])
                into.add(name, "terms", terms)
        into.add("", "batches", torch.tensor(1.0))

    found = reader.read(stage, batches, visit, label)
    count = found.of("")["batches"].item()
    return {name: _distance(found.of(name)["terms"], count) for name in cases}


def _answer(case: Case, call: Call) -> Tensor:
    return sparse_product(call, case[call.name])


def _distance(terms: Tensor, batches: float) -> Distance:
    """Return mean and error of Σ d / Σ n over batches with sums d of n tokens each."""
    tokens, total, squares, products, counts = terms.tolist()
    mean = total / tokens
    spread = squares - 2 * mean * products + mean * mean * counts
    if batches < 2:
        return Distance(mean, math.nan)
    return Distance(mean, math.sqrt(max(0.0, spread) * batches / (batches - 1)) / tokens)
