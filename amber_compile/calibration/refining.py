"""Fit what is left to fit to the sites that were chosen, all of them together.

    weight     W* of each site, from the dense model's own inputs              ridge.py
    output     α and β of each site, from the dense model's own outputs        output.py
               α and β of all sites, by the gradient of the whole's damage     tuning.py

In this order. Held-out text decides between the sites as they were, with what was fitted site by
site, and tuned together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .allocation import Chosen, Settled
from .options import CalibrationOptions
from .output import fit_outputs
from .reading import Batches, Reader, first, tokens_of
from .ridge import fit_weights
from .selection import Sparse
from .tuning import Tuning, tune
from .validation import Distance

STEP, OUTPUTS = 2048, 16384
"""Tokens that a step of tuning reads, and that outputs are fitted to site by site."""
Measure = Callable[[Chosen], Distance]
Case = dict[str, Sparse]


@dataclass(frozen=True)
class Refining:
    """What refining reads.

    Attributes:
        reader: of the model.
        weights: of the sites.
        batches: to fit on.
        options: what is allowed.
        measure: the damage of the whole on held-out text.
    """

    reader: Reader
    weights: Mapping[str, Tensor]
    batches: Batches
    options: CalibrationOptions
    measure: Measure

    def __call__(self, settled: Settled, stage: str, share: float = 1.0) -> Settled:
        """Return ``settled`` with what made it better; ``share`` of the steps are taken."""
        if not settled.chosen:
            return settled
        fitted = tuned = before = case_of(settled.chosen)
        if self.options.allows("weight"):
            fitted = self._weights(fitted, stage)
        if self.options.allows("output"):
            fitted = self._outputs(fitted, stage)
            tuned = self._tuned(fitted, stage, round(self.options.steps * share))
        for case in (tuned, fitted):
            if case != before:
                found = self._with(settled, case)
                if found.measured.mean < settled.measured.mean:
                    return found
        return settled

    def _weights(self, case: Case, stage: str) -> Case:
        fresh = {name: one for name, one in case.items() if not one.settings.updated_weight}
        memory, name = self.options.memory, f"weights {stage}"
        fit = self.reader, self.weights, fresh, self.batches, memory
        return {**case, **fit_weights(*fit, stage=name)} if fresh else case

    def _outputs(self, case: Case, stage: str) -> Case:
        fresh = {name: one for name, one in case.items() if not one.settings.output_scale}
        batches, name = first(self.batches, OUTPUTS), f"outputs {stage}"
        fit = self.reader, self.weights, fresh, batches
        return {**case, **fit_outputs(*fit, stage=name)} if fresh else case

    def _tuned(self, case: Case, stage: str, steps: int) -> Case:
        if not steps:
            return case
        tokens = min(STEP, sum(tokens_of(batch) for _, batch in self.batches))
        tuning = Tuning(("output",), steps, tokens, self.options.seed)
        return tune(self.reader, self.weights, case, self.batches, tuning, f"tuning {stage}")

    def _with(self, settled: Settled, case: Case) -> Settled:
        """Return ``settled`` with the sites of ``case``, measured."""
        chosen = {
            name: replace(choice, sparse=case[name]) for name, choice in settled.chosen.items()
        }
        return replace(settled, chosen=chosen, measured=self.measure(chosen))


def case_of(chosen: Chosen) -> Case:
    """Return how each site is sparse."""
    return {name: choice.sparse for name, choice in chosen.items()}
