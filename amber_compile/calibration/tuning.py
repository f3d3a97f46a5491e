"""Tune what is free at run time, all sites together, until the model answers as the dense one.

    minimise   mean over tokens of distance(dense answer, sparse answer)             (answers.py)
    over       α and β of each sparse site's output ("output"): y = (select(x) Wᵀ + b) · α + β
               and the weight of prefill ("weight"), where a second weight is paid for
    by         Adam (Kingma and Ba, arXiv 1412.6980), its rates falling along half a cosine

What is fitted site by site (output.py, ridge.py) knows nothing of the other sites; the gradient of
the whole model does. It starts from there. What was selected is a constant on the way back
(straight_through.py). The score's factor is not tuned: that was no better (docs/decisions.md).

No label is used: the dense model is the only teacher. α and β are a few numbers a channel, so some
ten thousand tokens fit them; a weight has more to fit, and wants more text. A parameter moves in
units of its own: α in ones, β in the rms of its site's output, a weight in the rms of its elements.
Experts, and gates that are one half of a fused product, stay as they are: they have no α.

A step reads batches that hold ``tokens`` tokens between them. Ranks share the batches of a step
and add up their gradients: all take the step that one process alone would take, but for rounding.
Memory: what one batch needs for its gradient, and four numbers for each that is tuned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from amber_compile.errors import OptionError, choices, whole_number

from . import distributed
from .answers import Answer
from .errors import CalibrationError
from .observe import Call, observing
from .reading import Batches, Reader
from .selection import Sparse, sparse_product
from .tuned import TUNES, Tuned

KEPT_EVERY = 10
"""Steps between two writes of the state."""


@dataclass(frozen=True)
class Tuning:
    """How to tune.

    Attributes:
        tunes: some of ``TUNES``.
        steps: of Adam.
        tokens: that a step reads at least.
        seed: of the order in which batches are read.

    Raises:
        OptionError: if a value is not one of these.
    """

    tunes: tuple[str, ...] = ("output",)
    steps: int = 60
    tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.tunes:
            if name not in TUNES:
                raise OptionError(choices("tunes", name, TUNES))
        for name, least in (("steps", 1), ("tokens", 1), ("seed", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))

    def rate(self, step: int) -> float:
        """Return the share of the first step's rates that ``step`` has."""
        return (1 + math.cos(math.pi * step / self.steps)) / 2


def tune(
    reader: Reader,
    weights: Mapping[str, Tensor],
    case: Mapping[str, Sparse],
    batches: Batches,
    tuning: Tuning,
    stage: str = "tuning",
) -> dict[str, Sparse]:
    """Return the sparse sites of ``case`` with their outputs or weights tuned.

    Args:
        reader: of the model.
        weights: of the sites (observe.py).
        case: the sparse sites as they are before, where tuning starts.
        batches: to read, of all ranks; again in another order when all were read.
        tuning: how.
        stage: name of the state that an interrupted run goes on from.

    Raises:
        CalibrationError: if an answer or a gradient is not finite, or another rank fails.
    """
    own = {name: weights[name] for name in case}
    steps = [*itertools.islice(_steps(batches, tuning), tuning.steps)]
    with distributed.failing_together():
        tuned = _started(reader, own, case, steps[0][0][1], tuning)
        done = tuned.load(reader.checkpoint, stage)
    if not tuned.values:
        return dict(case)
    for at in reader.bar(range(tuning.steps), done, "tuning", "step"):
        with distributed.failing_together():
            gradients = _gradients(reader, own, tuned, distributed.share(steps[at]))
        tuned.step(distributed.sums(gradients), tuning.rate(at))
        if (at + 1) % KEPT_EVERY == 0 or at + 1 == tuning.steps:
            tuned.save(reader.checkpoint, stage, at + 1)
    return tuned.case()


def _steps(batches: Batches, tuning: Tuning) -> Iterator[Batches]:
    """Yield the batches of each step, without end; every round has an order of its own."""
    drawn = torch.Generator().manual_seed(tuning.seed)
    step: list[tuple[int, Any]] = []
    while True:
        for at in torch.randperm(len(batches), generator=drawn).tolist():
            step.append(batches[at])
            if sum(_tokens(batch) for _, batch in step) >= tuning.tokens:
                yield step
                step = []


def _tokens(batch: Any) -> int:
    first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return first[..., 0].numel() if first.is_floating_point() else first.numel()


def _started(
    reader: Reader,
    weights: Mapping[str, Tensor],
    case: Mapping[str, Sparse],
    batch: Any,
    tuning: Tuning,
) -> Tuned:
    """Look at one batch: where outputs lie, and how large they are."""
    tuned = Tuned(case, [name for kind in tuning.tunes for name in TUNES[kind]])

    def visit(call: Call) -> Tensor:
        y = sparse_product(call, case[call.name])
        tuned.meet(call, y)
        return y

    with torch.no_grad(), observing(weights, visit):
        reader(batch)
    return tuned


def _gradients(
    reader: Reader, weights: Mapping[str, Tensor], tuned: Tuned, batches: list[tuple[int, Any]]
) -> dict[str, Tensor]:
    """Return the sum over tokens of the distance's gradients, by parameter."""
    found = {key: torch.zeros_like(value) for key, value in tuned.values.items()}
    for _, (_, batch) in batches:
        with torch.no_grad():
            dense = Answer(reader(batch), batch)
        with torch.enable_grad(), observing(weights, tuned.product):
            distance = dense.distances(Answer(reader(batch), batch)).sum()
        leaves = [*tuned.values.values()]
        gradients = torch.autograd.grad(distance, leaves, allow_unused=True)
        for total, new in zip(found.values(), gradients, strict=True):
            total += 0 if new is None else new
    _check_finite(found)
    return found


def _check_finite(gradients: Mapping[str, Tensor]) -> None:
    for key, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise CalibrationError(f"tuning: the gradient of {key} is not finite")
