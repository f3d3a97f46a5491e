"""The steps of one calibration, each a property that is computed when the next one asks for it.

candidates  →  orders  →  fitted  →  choices  →  settled  →  the plan
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from amber_compile.pattern import Pattern
from amber_compile.permutable import permutable
from amber_compile.settings import Settings

from .allocation import Chosen, Settled, covering
from .bound import most_below
from .candidates import Candidates
from .choosing import Choice, choices, ways
from .errors import CalibrationError
from .making import Calibration, Provenance, make_plan
from .options import CalibrationOptions
from .ordering import Orders, find_orders, ordered
from .reading import Batches, Reader, first, inputs_of, tokens_of
from .refining import Measure, Refining, case_of
from .selection import Sparse, with_factor
from .sensitivity import Sensing
from .smoothing_vectors import quantizations, smooth_vectors
from .statistics import Statistics
from .validation import Distance, distances

FITTED, SENSED = 49152, 32768
"""Tokens whose gradients are taken, of the text to fit on and of that held out: more of them would
move a mean by less than its sites differ."""


@dataclass(frozen=True)
class Run:
    """One calibration: each step is computed when the next one asks for it."""

    reader: Reader
    batches: Sequence[Any]
    options: CalibrationOptions

    @cached_property
    def candidates(self) -> Candidates:
        options = self.options
        return Candidates.of(
            self.reader.model,
            self.batches[0],
            Pattern.parse(options.pattern),
            options.projections,
            options.skip,
            options.quantize,
        )

    @cached_property
    def shares(self) -> tuple[Batches, Batches]:
        """The batches to fit on, and those that are held out: by lot."""
        drawn = torch.Generator().manual_seed(self.options.seed)
        order = torch.randperm(len(self.batches), generator=drawn).tolist()
        count = max(1, round(len(order) * self.options.validation))
        numbered = list(enumerate(self.batches))
        return [numbered[at] for at in order[count:]], [numbered[at] for at in order[:count]]

    @cached_property
    def orders(self) -> Orders:
        """The orders of channels in which less is lost, where they may be permuted."""
        if not self.options.allows("permutation"):
            return Orders()
        weights, pattern = self.candidates.weights, Pattern.parse(self.options.pattern)
        args, kwargs = inputs_of(self.batches[0], self.reader.model)
        may = permutable(self.reader.model, *args, kwargs=kwargs)
        case = {name: with_factor(one, Sparse(Settings(pattern))) for name, one in weights.items()}
        batches = first(self.shares[0], SENSED)
        return find_orders(self.reader, weights, case, batches, may)

    @cached_property
    def choices(self) -> dict[str, list[Choice]]:
        weights, seed = self.candidates.weights, self.options.seed
        heldout = self.shares[1]
        tried = ways(self.candidates, self.fitted, self.options)
        sensing = Sensing(self.reader, weights, tried, seed)
        return choices(
            self.candidates,
            tried,
            sensing("sensitivity", first(heldout, SENSED), "sensitivity of every site"),
        )

    @cached_property
    def fitted(self) -> Statistics:
        """Ranges and gradients of every site."""
        weights, fit = self.candidates.seen, first(self.shares[0], FITTED)
        blank: Mapping[str, Mapping[str, Sparse]] = {name: {} for name in weights}
        return Sensing(self.reader, weights, blank, self.options.seed)("fit", fit, "gradients")

    def measure(self, cases: Mapping[str, Mapping[str, Sparse]], what: str) -> dict[str, Distance]:
        """Return the damage of whole models on the held-out text."""
        weights = self.candidates.weights
        return distances(self.reader, weights, cases, self.shares[1], what, f"damage, {what}")

    @cached_property
    def paper(self) -> float | None:
        """The damage of the paper's method, if its rule takes any projection."""
        case = {
            name: with_factor(self.candidates.weights[name], Sparse(settings))
            for name, settings in self.candidates.paper.items()
        }
        return self.measure({"paper": case}, "paper")["paper"].mean if case else None

    @cached_property
    def settled(self) -> Settled:
        """The sites that are sparse, refined."""
        runs = itertools.count()

        def measure(chosen: Chosen) -> Distance:
            return self.measure({"all": case_of(chosen)}, f"run {next(runs)}")["all"]

        weights, options = self.candidates.weights, self.options
        refine = Refining(self.reader, weights, self.shares[0], options, measure)
        if options.rule == "paper":
            return refine(self._by_rule(measure), "rule")
        if options.coverage is not None:
            total = self.candidates.total
            return refine(covering(self.choices, total, options.coverage, measure), "coverage")
        wanted = self.paper if options.max_error is None else options.max_error
        if wanted is None:
            raise CalibrationError(
                "the paper's rule names no projection of this model, so its damage is no bound: "
                "say max_error= or coverage="
            )
        return most_below(wanted, self.choices, self.candidates.total, measure, refine)

    def _by_rule(self, measure: Measure) -> Settled:
        chosen = {
            name: next(one for one in self.choices[name] if one.sparse.settings.part == how.part)
            for name, how in self.candidates.paper.items()
        }
        if not chosen:
            raise CalibrationError("rule='paper' names no projection of this model")
        return Settled(chosen, measure(chosen))

    def finish(self, began: float) -> Calibration:
        """Run all steps and write the plan."""
        _ = self.paper  # of the channels as they stand
        with ordered(self.reader.model, self.orders):
            return self._ordered(began)

    def _ordered(self, began: float) -> Calibration:
        settled = self.settled
        fitted, heldout = (sum(tokens_of(b) for _, b in share) for share in self.shares)
        facts = self.reader.checkpoint.facts
        quantized = quantizations(self.candidates, self.options)
        smooth = smooth_vectors(self.candidates, self.fitted, quantized)
        provenance = Provenance(self.options, facts, (fitted, heldout))
        plan = make_plan(self.candidates, settled, provenance, quantized, smooth, self.orders)
        took = time.monotonic() - began
        return Calibration(plan, settled, self.paper, self.choices, self.candidates, took)
