"""The ways to sparsify each site, and which of them held-out text prefers.

Every site is tried with the score and each correction that is allowed, and keeps the way with the
smallest damage (sensitivity.py). A fused gate and up projection is tried whole and by its gate
half, which makes half as much sparse; the knapsack takes one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amber_compile.calibration.allocate import Option
from amber_compile.pattern import Pattern
from amber_compile.scores import weight_norm
from amber_compile.settings import CALIBRATED, Settings

from .candidates import Candidates
from .options import CalibrationOptions
from .selection import Sparse, with_factor
from .sensitivity import Options, Sensitivity, sensitivities
from .statistics import Statistics


@dataclass(frozen=True)
class Choice:
    """One way to sparsify a site, measured on held-out text."""

    sparse: Sparse
    measured: Sensitivity
    macs: int

    @property
    def option(self) -> Option:
        """What the knapsack needs to know."""
        return Option(self.measured.damage, self.macs, self)


def ways(
    candidates: Candidates, fitted: Statistics, options: CalibrationOptions
) -> dict[str, Options]:
    """Return every way to sparsify each candidate that ``options`` allow."""
    return {
        name: {str(way.settings): way for way in _ways(name, candidates, fitted, options)}
        for name in candidates.weights
    }


def choices(
    candidates: Candidates, tried: Mapping[str, Options], heldout: Statistics
) -> dict[str, list[Choice]]:
    """Return the best way of each site, of those that make equally much sparse."""
    found: dict[str, list[Choice]] = {}
    for name, options in tried.items():
        measured = sensitivities(heldout, name)
        best: dict[str | None, Choice] = {}
        for label, sparse in options.items():
            part = sparse.settings.part
            macs = candidates.macs([name]) // (2 if part else 1)
            choice = Choice(sparse, measured[label], macs)
            if part not in best or choice.measured.damage < best[part].measured.damage:
                best[part] = choice
        found[name] = list(best.values())
    return found


def mixed_factor(weight: Tensor, fisher: Tensor) -> Tensor:
    """Return √(weight norm · Fisher norm) of each channel, fp32 [K] or [E, K].

    Each norm is divided by its mean. ``fisher`` is Σ (∂L/∂x_j)²: how much the loss minds a change
    of channel j.
    """
    rows = weight if weight.dim() == 3 else weight[None]
    norms = torch.stack([weight_norm(one) for one in rows]).double()
    minds = fisher.sqrt().to(norms.device)
    scaled = norms / norms.mean(-1, keepdim=True) * (minds / minds.mean().clamp(min=1e-300))
    factor = scaled.sqrt().float()
    return factor if weight.dim() == 3 else factor[0]


def _ways(
    name: str, candidates: Candidates, fitted: Statistics, options: CalibrationOptions
) -> Iterator[Sparse]:
    pattern, weight = Pattern.parse(options.pattern), candidates.weights[name]
    plain = with_factor(weight, Sparse(Settings(pattern, "weight_norm")))
    scored = [plain]
    if options.allows("factor"):
        tensors = {"factor": mixed_factor(weight, fitted.of(name)["fisher_x"])}
        scored.append(Sparse(Settings(pattern, CALIBRATED), tensors))
    if candidates.paper.get(name, Settings()).part:
        scored.append(with_factor(weight, Sparse(replace(plain.settings, part="gate"))))
    for one in scored:
        yield one
        if options.allows("norm") and not options.allows("output"):  # which does its work
            yield replace(one, settings=replace(one.settings, correction="norm"))
