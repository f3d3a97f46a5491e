"""What do the measured rows say?  Ratios, crossovers and targets: arithmetic, no device.

    ratio        seconds of the best dense product of the same run over those of a variant
    crossover    the least token count from which a variant wins at that and at every larger one
    verdict      a target, the worst ratio among the rows that it speaks of, and whether it is met

"Best dense" is the fastest of all dense variants of a kind that are right: cuBLAS with the weight
either way round, and cublasLt. A 2:4 product is charged with its compression, and dense int8 with
its quantisation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_compress import LARGE

Row = Mapping[str, Any]
Point = tuple[int, int, int]
"""Channels (K), outputs (N), tokens (T)."""

EVERYTHING = {"bf16": "multiply", "int8": "quantize+multiply", "fp8": "quantize+multiply"}
"""The stage of a dense variant that starts from the same activation as ours."""


def point_of(row: Row) -> Point:
    return row["channels"], row["outputs"], row["tokens"]


def is_timed(row: Row) -> bool:
    return "seconds" in row


def label(row: Row) -> str:
    """Name the variant of a row. Algorithms of cuSPARSELt are one variant: the best one counts."""
    note = row["note"] if row["library"] != "cuSPARSELt" else ""
    return " ".join(filter(None, (row["library"], row["kind"], row["stage"], note)))


def best_dense(rows: Iterable[Row], kind: str, stage: str) -> dict[Point, float]:
    """Return the seconds of the fastest dense variant of a kind and stage, by point."""
    best: dict[Point, float] = {}
    for row in filter(is_timed, rows):
        if (row["library"], row["kind"], row["stage"]) == ("dense", kind, stage):
            point = point_of(row)
            best[point] = min(row["seconds"], best.get(point, float("inf")))
    return best


def with_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows, each timed one with its ratios to dense bf16 and dense of its own kind."""
    bf16 = best_dense(rows, "bf16", "multiply")
    same = {kind: best_dense(rows, kind, stage) for kind, stage in EVERYTHING.items()}
    ready = {kind: best_dense(rows, kind, "multiply") for kind in EVERYTHING}
    found = []
    for row in rows:
        more: dict[str, float] = {}
        if is_timed(row):
            point, seconds = point_of(row), row["seconds"]
            own = ready if row["stage"] == "multiply" else same
            for name, dense in (("to_bf16", bf16), ("to_own_kind", own[row["kind"]])):
                if point in dense:
                    more[name] = dense[point] / seconds
        found.append({**row, **more})
    return found


def crossover(ratios: Mapping[int, float]) -> int | None:
    """Return the least token count from which on every measured ratio is above 1."""
    least = None
    for tokens in sorted(ratios, reverse=True):
        if ratios[tokens] <= 1:
            break
        least = tokens
    return least


def crossovers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one row per shape and whole variant: from how many tokens on it beats dense bf16."""
    ratios: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.get("library") not in (None, "dense") and row["stage"] != "multiply":
            known = ratios[row["model"], row["channels"], row["outputs"], label(row)]
            if "to_bf16" in row:
                known[row["tokens"]] = max(row["to_bf16"], known.get(row["tokens"], 0.0))
    return [
        {"model": model, "channels": channels, "outputs": outputs, "variant": name}
        | {"crossover": crossover(known), "measured": sorted(known)}
        for (model, channels, outputs, name), known in ratios.items()
    ]


def with_shares(rows: Sequence[Row], peaks: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Return the rows, each timed one with its rate as a share of the dense peak of its kind.

    Zeros count, so that a 2:4 product may have a share above 1.
    """
    found = []
    for row in rows:
        peak = peaks.get(row["kind"]) if is_timed(row) else None
        found.append({**row, "of_peak": row["per_second"] / peak} if peak else {**row})
    return found


# ---- targets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A ratio that our whole product must reach where K, N and T are these."""

    text: str
    kind: str
    ratio: str
    least: float
    channels: int | None = None
    outputs: int | None = None
    tokens: int = 2048
    note: str = ""

    def speaks_of(self, row: Row) -> bool:
        """Return whether a row is one that must reach it."""
        mlp = row["channels"] != row["outputs"]
        return (
            row.get("library") == "amber"
            and (row["kind"], row["stage"], row["note"]) == (self.kind, WHOLE, self.note)
            and self.channels in (None, row["channels"])
            and self.outputs in (None, row["outputs"])
            and row["tokens"] >= self.tokens
            and (row.get("dense_because") is None if self.note else mlp)
        )


WHOLE = "compress+multiply"
QUANTIZED = "nm_quantized_linear"
TARGETS = (
    Target("bf16, 4096→14336, of dense bf16", "bf16", "to_bf16", 1.35, 4096, 14336),
    Target("bf16, 14336→4096, of dense bf16", "bf16", "to_bf16", 1.2, 14336, 4096),
    Target("int8, MLP shapes, of dense bf16", "int8", "to_bf16", 2.2),
    Target("int8, MLP shapes, of dense int8", "int8", "to_own_kind", 1.35),
    Target("nm_linear where it is sparse", "bf16", "to_bf16", 1.0, tokens=1, note="nm_linear"),
    Target(f"{QUANTIZED} where it is sparse", "int8", "to_own_kind", 1.0, tokens=1, note=QUANTIZED),
)
COMPRESS_TARGET = 0.75


def verdicts(
    gemm: Sequence[Row], compress: Sequence[Row], copy: float | None
) -> list[dict[str, Any]]:
    """Return one row per target: the worst and best figure, where, and whether it is met.

    ``gemm`` are rows of ``with_ratios``; ``copy`` is the measured copy bandwidth. A target of which
    nothing was measured is not met.
    """
    found = []
    for target in TARGETS:
        of = [row for row in gemm if target.speaks_of(row)]
        figures = {
            f"T={r['tokens']} {r['channels']}→{r['outputs']}": r.get(target.ratio) for r in of
        }
        found.append(_verdict(target.text, target.least, figures))
    shares = {
        f"{row['operation']} {row['tokens']}x{row['channels']}": share(row, copy)
        for row in compress
        if row["operation"].startswith("compress") and is_large(row)
    }
    for kind in EVERYTHING:
        of_kind = {name: value for name, value in shares.items() if f" {kind}" in name}
        found.append(_verdict(f"compress {kind}, of copy", COMPRESS_TARGET, of_kind))
    return found


def share(row: Row, copy: float | None) -> float | None:
    """Return the bandwidth of a row as a share of the large copy's."""
    return row["bandwidth"] / copy if copy and "bandwidth" in row else None


def is_large(row: Row) -> bool:
    """Return whether no cache holds the activation of a compression."""
    return bool(2 * row["tokens"] * row["channels"] >= LARGE)


def _verdict(text: str, least: float, figures: Mapping[str, float | None]) -> dict[str, Any]:
    known = {name: value for name, value in figures.items() if value is not None}
    if not known:
        return {"target": text, "least": least, "worst": None, "met": False}
    where = min(known, key=known.__getitem__)
    whole = len(known) == len(figures)  # what failed or was skipped is not met
    return {
        "target": text,
        "least": least,
        "worst": known[where],
        "where": where,
        "best": max(known.values()),
        "met": whole and known[where] >= least,
    }
