"""What pruning the input of each projection does, for all projections in one pass over the data.

    error      ‖Y' - Y‖₂ / ‖Y‖₂          Y = x Wᵀ dense, Y' sparse    (Amber Pruner, section 3)
    damage     ½ E (g · (Y' - Y))²       g = gradient at Y of the loss of a drawn label

``damage`` is the change of the final distribution that the site alone would cause, a token: KL to
second order (answers.py), from one backward pass for all sites and all their options. It is taken
row by row: how the changes of two tokens add up or cancel is left out.

The same pass takes what corrections and smoothing are made from, per channel:

    absmax     max |x_j|                 exact, in the type of x
    fisher_x   Σ (∂L/∂x_j)²              through this projection only
    fisher_y   Σ (∂L/∂y_n)²

Memory does not depend on the number of tokens. Nothing of it stays on the model (observe.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .answers import Answer
from .errors import CalibrationError
from .observe import Call, observing, tapped
from .reading import Batches, Reader
from .selection import Sparse, sparse_product
from .statistics import Statistics

ALL = ""
"""Where sums of the whole model stand among those of its sites."""
Options = Mapping[str, Sparse]
"""Ways to sparsify a site, by a label."""


@dataclass(frozen=True)
class Sensitivity:
    """What one way of sparsifying one site does.

    Attributes:
        error: relative l2 error of its output.
        damage: change of the final distribution, a token (nats for logits).
    """

    error: float
    damage: float


@dataclass(frozen=True)
class Sensing:
    """The pass over the data.

    Attributes:
        reader: of the model.
        weights: of the sites (observe.py).
        options: of each site.
        seed: of the labels that are drawn.
    """

    reader: Reader
    weights: Mapping[str, Tensor]
    options: Mapping[str, Options]
    seed: int = 0

    def __call__(self, stage: str, batches: Batches, label: str) -> Statistics:
        """Return the sums over ``batches``.

        Raises:
            CalibrationError: naming the first site that reads a NaN or an infinity.
        """
        return self.reader.read(stage, batches, self._visit, label)

    def _visit(self, number: int, batch: Any, into: Statistics) -> None:
        anchor = torch.zeros((), device=self.reader.device, requires_grad=True)

        def visit(call: Call) -> Tensor:
            _take_range(call, into)
            x = tapped(call.x, anchor, lambda g: into.add(call.name, "fisher_x", _squares(g)))
            return tapped(call(x), anchor, lambda g: self._at_y(call, g, into))

        with torch.enable_grad(), observing(self.weights, visit):
            answer = Answer(self.reader(batch), batch)
            check_finite(into)
            loss = answer.loss(_generator(self.seed, number))
        torch.autograd.grad(loss, anchor)
        into.add(ALL, "tokens", torch.tensor(float(answer.values.shape[0])))

    @torch.no_grad()
    def _at_y(self, call: Call, gradient: Tensor, into: Statistics) -> None:
        into.add(call.name, "fisher_y", _squares(gradient))
        into.add(call.name, "rows", torch.tensor(float(gradient.shape[:-1].numel())))
        if not self.options[call.name]:
            return
        y = call()
        into.add(call.name, "size", (y - _bias(call)).float().square().sum())
        for label, sparse in self.options[call.name].items():
            change = sparse_product(call, sparse).float() - y.float()
            damage = (gradient.float() * change).sum(-1).square().sum() / 2
            into.add(call.name, f"damage.{label}", damage)
            into.add(call.name, f"error.{label}", change.square().sum())


def sensitivities(statistics: Statistics, site: str) -> dict[str, Sensitivity]:
    """Return what each option does at ``site``, from the sums of :class:`Sensing`."""
    held, tokens = statistics.of(site), statistics.of(ALL)["tokens"].item()
    labels = [name.removeprefix("damage.") for name in held if name.startswith("damage.")]
    size = held["size"].item()
    return {
        label: Sensitivity(
            error=math.sqrt(held[f"error.{label}"].item() / size) if size else 0.0,
            damage=held[f"damage.{label}"].item() / tokens,
        )
        for label in labels
    }


def check_finite(statistics: Statistics) -> None:
    """Raise if a site has read something that is not finite, naming the first.

    Raises:
        CalibrationError: naming the site and the channel.
    """
    for site in statistics:
        largest = statistics.of(site).get("absmax")
        if largest is not None and not bool(largest.isfinite().all()):
            broken = (~largest.isfinite()).nonzero()
            raise CalibrationError(
                f"{site} reads a NaN or an infinity in {len(broken)} of {largest.numel()} channels "
                f"(first: {int(broken[0])}), and no projection before it does: the model cannot be "
                "calibrated as it is; try another dtype, such as bfloat16 or float32"
            )


def _bias(call: Call) -> Tensor | float:
    """Return what the product adds whatever it reads, [N]; experts add nothing."""
    return 0.0 if call.offsets is not None else call(torch.zeros_like(call.rows[:1]))[0]


def _take_range(call: Call, into: Statistics) -> None:
    if call.rows.numel():
        into.raise_to(call.name, "absmax", call.rows.detach().abs().amax(0))


def _squares(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the random numbers of one batch: the same whichever rank reads it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
