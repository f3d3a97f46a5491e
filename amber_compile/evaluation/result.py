"""What an evaluation found: values, as a table for people and as JSON for machines.

    {"dense": {"nll", "ppl", ...}, "sparse": {"nll", "nll_se", "ppl", "kl", "top1", ...},
     "coverage": {"macs", ...}}

``nll_se`` is the standard error of ``nll_delta``, the sparse model's loss minus the dense one's:
both read the same windows, so it is far smaller than that of either loss. A figure that is infinite
or not a number says so, beside the count of tokens to blame; one that does not exist is None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from amber_compile.debug.output_error import number
from amber_compile.report import Report

from .generation import Generation
from .likelihoods import Sums
from .moments import Mean


@dataclass(frozen=True)
class Value:
    """A mean with its standard error, which is None of fewer than two samples."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, running: Mean) -> Value:
        """Return what a running mean has come to."""
        return cls(running.mean, running.error)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")

    def percent(self) -> str:
        """Return a share in per cent."""
        return f"{self.mean:.2%}" + ("" if self.error is None else f" ± {self.error:.2%}")


@dataclass(frozen=True)
class Evaluation:
    """A model, dense and sparse, on the same text.

    Attributes:
        kind: ``causal``, or ``masked``, which has no losses.
        windows: that were read.
        tokens: that were compared.
        dense: loss of the dense model, in nats a token; its error is over windows.
        sparse: loss of the sparse model; the error likewise.
        delta: sparse minus dense, with the paired error.
        kl: KL(dense ‖ sparse), in nats a token.
        top1: share of tokens at which both have the same likeliest token.
        bad: tokens whose logits are no distribution, dense and sparse.
        coverage: share of the linear MACs that read a selection.
        removed: share of the same that meet a dropped zero.
        quantized: share of the same that is multiplied in 8 bit.
        sites: projections that are sparse, and all.
        generation: continuations from a sparse and from a dense prefill, if asked for.
    """

    kind: str
    windows: int
    tokens: int
    dense: Value | None
    sparse: Value | None
    delta: Value | None
    kl: Value
    top1: Value
    bad: tuple[int, int] = (0, 0)
    coverage: float = 0.0
    removed: float = 0.0
    quantized: float = 0.0
    sites: tuple[int, int] = (0, 0)
    generation: Generation | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values: infinity and NaN are strings."""
        sparse = _loss(self.sparse) | {
            "nll_delta": self.delta and number(self.delta.mean),
            "nll_se": self.delta and number(self.delta.error),
            **_pair("kl", self.kl),
            **_pair("top1", self.top1),
            "bad_tokens": self.bad[1],
        }
        if self.generation:
            sparse["generation"] = self.generation.to_json()
        counts = {"kind": self.kind, "windows": self.windows, "tokens": self.tokens}
        sites = {"sparse_sites": self.sites[0], "sites": self.sites[1]}
        return {
            "dense": {**_loss(self.dense), **counts, "bad_tokens": self.bad[0]},
            "sparse": sparse,
            "coverage": {
                "macs": self.coverage,
                "removed": self.removed,
                "quantized": self.quantized,
                **sites,
            },
        }

    def __str__(self) -> str:
        lines = [f"{self.windows} windows, {self.tokens:,} tokens compared; ± is a standard error"]
        rows: list[tuple[str, ...]] = []
        if self.dense and self.sparse and self.delta:
            losses = f"{self.dense.mean:.4f}", f"{self.sparse.mean:.4f}"
            rows.append(("loss, nats a token", *losses, str(self.delta)))
            rows.append(("perplexity", *map(_perplexity, (self.dense, self.sparse)), ""))
        rows.append(("KL(dense ‖ sparse)", "", "", str(self.kl)))
        rows.append(("same likeliest token", "", "", self.top1.percent()))
        heading = ("", "dense", "sparse", "difference")
        lines += ["", *(f"{a:22}{b:>10}{c:>10}   {d}".rstrip() for a, b, c, d in (heading, *rows))]
        lines += ["", self._covered()]
        lines += [str(self.generation)] if self.generation else []
        if any(self.bad):
            lines.append(
                f"logits that are no distribution (NaN or infinity): {self.bad[0]} tokens dense, "
                f"{self.bad[1]} sparse"
            )
        return "\n".join(lines)

    def _covered(self) -> str:
        return (
            f"{self.sites[0]} of {self.sites[1]} projections sparse: {self.coverage:.1%} of linear "
            f"MACs covered, {self.removed:.1%} removed"
            + (f"; {self.quantized:.1%} quantised" if self.quantized else "")
        )


@dataclass
class Tally:
    """The running means of one case; what becomes an :class:`Evaluation`."""

    dense: Mean = field(default_factory=Mean)
    sparse: Mean = field(default_factory=Mean)
    delta: Mean = field(default_factory=Mean)
    kl: Mean = field(default_factory=Mean)
    top1: Mean = field(default_factory=Mean)
    bad: tuple[int, int] = (0, 0)

    def add(self, sums: Sums) -> None:
        """Add the windows of a batch."""
        self.dense.add(sums.dense_nll, sums.tokens)
        self.sparse.add(sums.sparse_nll, sums.tokens)
        self.delta.add(sums.sparse_nll - sums.dense_nll, sums.tokens)
        self.kl.add(sums.kl, sums.tokens)
        self.top1.add(sums.top1, sums.tokens)
        worse = int(sums.dense_bad.sum()), int(sums.sparse_bad.sum())
        self.bad = self.bad[0] + worse[0], self.bad[1] + worse[1]

    def result(self, kind: str, report: Report, generation: Generation | None) -> Evaluation:
        """Return what was found so far."""
        causal = kind == "causal"
        return Evaluation(
            kind=kind,
            windows=self.kl.windows,
            tokens=int(self.kl.tokens),
            dense=Value.of(self.dense) if causal else None,
            sparse=Value.of(self.sparse) if causal else None,
            delta=Value.of(self.delta) if causal else None,
            kl=Value.of(self.kl),
            top1=Value.of(self.top1),
            bad=self.bad,
            coverage=report.coverage,
            removed=report.removed,
            quantized=report.quantized,
            sites=(sum(site.decision.sparse for site in report.sites), len(report.sites)),
            generation=generation,
        )


def _loss(value: Value | None) -> dict[str, Any]:
    """Return loss and perplexity."""
    nll = value and number(value.mean)
    return {"nll": nll, "ppl": value and number(exponential(value.mean))}


def _pair(name: str, value: Value) -> dict[str, Any]:
    return {name: number(value.mean), f"{name}_se": number(value.error)}


def exponential(loss: float) -> float:
    """Return e to the power of ``loss``: infinity where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _perplexity(value: Value) -> str:
    return f"{exponential(value.mean):.3f}"
