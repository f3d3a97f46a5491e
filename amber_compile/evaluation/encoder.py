"""What sparsity changes in sentence embeddings.

    embedding    mean over the tokens of last_hidden_state, divided by its length
    cosine       of the dense and the sparse embedding of one sentence
    nearest      whether a sentence's nearest other one is the same, among dense embeddings as
                 among sparse ones

Embeddings are kept, [sentences, width]; hidden states are not. Sentences are the samples of the
standard errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amber_compile.debug.output_error import number
from amber_compile.errors import OptionError
from amber_compile.plan import Plan
from amber_compile.report import Report

from .moments import Mean
from .progress import bar
from .result import Value
from .side_by_side import config_of, plain, sides

ROWS = 1024
"""Sentences whose neighbours are sought at a time."""


@dataclass(frozen=True)
class EncoderEvaluation:
    """Sentence embeddings, dense and sparse.

    Attributes:
        sentences: how many.
        distance: 1 - cosine of dense and sparse embedding, the mean over sentences.
        largest: of the same.
        nearest: share of sentences with the same nearest other sentence.
        bad: sentences whose embedding is not finite, dense and sparse.
        coverage: share of the linear MACs that read a selection.
    """

    sentences: int
    distance: Value
    largest: float
    nearest: Value
    bad: tuple[int, int]
    coverage: float

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values: infinity and NaN are strings."""
        return {
            "sentences": self.sentences,
            "distance": number(self.distance.mean),
            "distance_se": number(self.distance.error),
            "largest": number(self.largest),
            "nearest": number(self.nearest.mean),
            "nearest_se": number(self.nearest.error),
            "bad": list(self.bad),
            "coverage": {"macs": self.coverage},
        }

    def __str__(self) -> str:
        lines = [
            f"{self.sentences} sentences, {self.coverage:.1%} of linear MACs covered",
            f"1 - cosine            {self.distance}   (largest {self.largest:.4f})",
            f"same nearest sentence {self.nearest.percent()}",
        ]
        if any(self.bad):
            lines.append(f"embeddings not finite: {self.bad[0]} dense, {self.bad[1]} sparse")
        return "\n".join(lines)


def evaluate_encoder(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    plan: Plan | str | None = None,
    backend: str = "amber_eager",
    progress: bool = True,
    **options: Any,
) -> EncoderEvaluation:
    """Return what sparsity changes in the embeddings of sentences.

    Args:
        model: an encoder that returns ``last_hidden_state``, with its weights.
        batches: its keyword inputs, ``attention_mask`` among them, of some sentences each.
        plan: a plan, or the path of one.
        backend: ``"amber_eager"``, or ``"amber"`` to run what Inductor generates.
        progress: show a bar on stderr.
        options: the fields of :class:`AmberConfig`.

    Raises:
        TypeError: if ``model`` is no module.
        OptionError: for an unknown option or value, or fewer than two sentences.
    """
    cases = {"sparse": options if plan is None else {**options, "plan": plan}}
    found = evaluate_encoder_cases(model, batches, cases, backend=backend, progress=progress)
    return found["sparse"]


def evaluate_encoder_cases(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    cases: Mapping[str, Mapping[str, Any]],
    *,
    backend: str = "amber_eager",
    progress: bool = True,
) -> dict[str, EncoderEvaluation]:
    """Return what each of ``cases`` changes, name -> options; the dense model runs once for all.

    Arguments and errors as :func:`evaluate_encoder`.
    """
    configs = {name: config_of(each) for name, each in cases.items()}
    total = len(batches) if isinstance(batches, Sized) else None
    device = next((one.device for one in plain(model).parameters()), None)
    expected: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in cases}
    with sides(model, configs, backend=backend, dynamic=True) as (dense, sparse):
        for batch in bar(batches, "sentences", progress, total):
            inputs = {name: value.to(device) for name, value in batch.items()}
            mask = inputs.get("attention_mask")
            expected.append(embed(dense(**inputs), mask).cpu())
            for name, run in sparse.items():
                found[name].append(embed(run(**inputs), mask).cpu())
        if sum(map(len, expected)) < 2:
            raise OptionError("batches= holds fewer than two sentences")
        reference = torch.cat(expected)
        return {
            name: compare_embeddings(reference, torch.cat(found[name]), run.report)
            for name, run in sparse.items()
        }


def embed(output: Any, mask: Tensor | None) -> Tensor:
    """Return the embeddings [B, width] of a batch, float32 and of length 1.

    Raises:
        OptionError: if the model returned no ``last_hidden_state``.
    """
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise OptionError(f"the model returns no last_hidden_state ({type(output).__name__})")
    weight = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
    weight = weight.float()[..., None]
    summed = (hidden.float() * weight).sum(1) / weight.sum(1).clamp_min(1)
    return nn.functional.normalize(summed, dim=-1)


def compare_embeddings(dense: Tensor, sparse: Tensor, report: Report) -> EncoderEvaluation:
    """Compare embeddings [sentences, width] of length 1."""
    distance, nearest, ones = Mean(), Mean(), torch.ones(len(dense))
    away = 1 - (dense.double() * sparse.double()).sum(1)
    distance.add(away, ones)
    bad = [~each.isfinite().all(1) for each in (dense, sparse)]
    same = (neighbours(dense) == neighbours(sparse)) & ~bad[0] & ~bad[1]
    nearest.add(same, ones)
    return EncoderEvaluation(
        sentences=len(dense),
        distance=Value.of(distance),
        largest=float(away.max()),
        nearest=Value.of(nearest),
        bad=(int(bad[0].sum()), int(bad[1].sum())),
        coverage=report.coverage,
    )


def neighbours(embeddings: Tensor) -> Tensor:
    """Return the index of each embedding's nearest other one."""
    found = []
    for start in range(0, len(embeddings), ROWS):
        alike = embeddings[start : start + ROWS] @ embeddings.T
        alike[torch.arange(len(alike)), torch.arange(start, start + len(alike))] = -torch.inf
        found.append(alike.argmax(1))
    return torch.cat(found)
