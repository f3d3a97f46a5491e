"""The tables of ``gpu.py``, laid out from its rows; nothing is measured or judged here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpu_ceilings import best
from gpu_operands import TOKENS
from gpu_tune import best_tiles
from gpu_verdicts import label, share
from rich.table import Table

Row = Mapping[str, Any]
Result = Mapping[str, Any]
WIDTH = 118


def tables(result: Result) -> Iterator[Table]:
    """Yield the tables of what was measured, the verdicts last."""
    for name, make in {
        "rates": rates,
        "ceilings": ceilings,
        "correctness": correctness,
        "compress": compress,
        "gemm": products,
        "crossovers": crossovers,
        "tune": tiles,
        "verdicts": verdicts,
    }.items():
        if result.get(name):
            yield make(result)


def number(value: float | None, form: str = ".2f", after: str = "") -> str:
    """Return a figure, or a dash for one that there is not."""
    return "-" if value is None else f"{value:{form}}{after}"


def rates(result: Result) -> Table:
    """Dense and sparse rate of each instruction, and their ratio."""
    shown = Table(
        "instruction", "dense", "2:4", "ratio", title="T(FL)OP/s of the instruction alone"
    )
    found = {(row["family"], row["kind"], row["sparse"]): row for row in result["rates"]}
    for family, kind in dict.fromkeys((family, kind) for family, kind, _ in found):
        pair = [found.get((family, kind, sparse), {}) for sparse in (False, True)]
        values = [row.get("teraops") for row in pair]
        ratio = values[1] / values[0] if None not in values else None
        cells = (
            number(value, ".0f") if value is not None else row.get("error", "-")[:40]
            for value, row in zip(values, pair, strict=True)
        )
        shown.add_row(f"{family} {kind}", *cells, number(ratio))
    return shown


def ceilings(result: Result) -> Table:
    """What the device does at best."""
    shown = Table("ceiling", "rate", title="measured ceilings")
    for row in result["ceilings"]:
        unit = "TB/s" if row["ceiling"] == "copy" else "T(FL)OP/s"
        cell = row.get("error") or f"{row['per_second'] / 1e12:.3g} {unit}"
        shown.add_row(row["ceiling"], cell)
    return shown


def correctness(result: Result) -> Table:
    """What is right, kind by kind."""
    shown = Table(
        "kind", "sparse product", "checks", "wrong", title="against fp64, poisoned outputs"
    )
    for kind in dict.fromkeys(row["kind"] for row in result["correctness"]):
        rows = [row for row in result["correctness"] if row["kind"] == kind]
        wrong = [f"{row['check']}: {row['wrong']}" for row in rows if row.get("wrong")]
        offered = next((row["offered"] for row in rows if "offered" in row), "-")
        shown.add_row(kind, offered, str(len(rows)), "; ".join(wrong)[:300] or "none")
    return shown


def compress(result: Result) -> Table:
    """Bandwidth of each operation as a share of the copy's."""
    copy = best(result.get("ceilings", []), "copy")
    shown = Table("activation", title="compression: share of the large copy's bandwidth")
    names = list(dict.fromkeys(row["operation"] for row in result["compress"]))
    for name in names:
        shown.add_column(name.replace("compress ", ""))
    found = {(row["tokens"], row["channels"], row["operation"]): row for row in result["compress"]}
    for tokens, channels in dict.fromkeys((tokens, channels) for tokens, channels, _ in found):
        row_of = [found.get((tokens, channels, name), {}) for name in names]
        cells = [number(share(row, copy), ".0%") for row in row_of]
        shown.add_row(f"{tokens}x{channels}", *cells)
    return shown


def products(result: Result) -> Table:
    """Every variant's ratio to the best dense bf16; a dash is not measured, or wrong.

    The last column is its best rate as a share of the dense peak of its kind, zeros counted.
    """
    shown = Table("shape", "variant", title="times as fast as the best dense bf16 of the same run")
    for tokens in TOKENS:
        shown.add_column(str(tokens))
    shown.add_column("peak")
    shares: dict[tuple[str, str], float] = {}
    ratios: dict[tuple[str, str], dict[int, float]] = {}
    for row in result["gemm"]:
        if "library" in row:
            shape = f"{row['channels']}→{row['outputs']}"
            by_tokens = ratios.setdefault((shape, label(row)), {})
            best_yet = by_tokens.get(row["tokens"], 0.0)
            by_tokens[row["tokens"]] = max(best_yet, row.get("to_bf16", 0.0))
            best_share = shares.get((shape, label(row)), 0.0)
            shares[shape, label(row)] = max(best_share, row.get("of_peak", 0.0))
    before = ""
    for (shape, name), by_tokens in sorted(ratios.items(), key=lambda item: _order(*item[0])):
        line = (number(by_tokens.get(tokens) or None) for tokens in TOKENS)
        peak = number(shares[shape, name] or None, ".0%")
        shown.add_row("" if shape == before else shape, name, *line, peak)
        before = shape
    return shown


def _order(shape: str, name: str) -> tuple[str, int, str]:
    return shape, ("dense", "cuSPARSELt", "amber").index(name.split()[0]), name


def crossovers(result: Result) -> Table:
    """From how many tokens on each variant wins."""
    shown = Table("shape", "variant", "wins from T", title="crossover with the best dense bf16")
    for row in result["crossovers"]:
        if "cuSPARSELt" not in row["variant"]:
            wins = str(row["crossover"] or "never")
            shown.add_row(f"{row['channels']}→{row['outputs']}", row["variant"], wins)
    return shown


def tiles(result: Result) -> Table:
    """The fastest tile of each product."""
    columns = ("kind", "shape", "T", "fastest tile", "T(FL)OP/s", "over the chosen")
    shown = Table(*columns, title="tiles of the sparse products")
    for row in best_tiles(result["tune"]):
        shape, rate = f"{row['channels']}→{row['outputs']}", number(row["per_second"] / 1e12, ".0f")
        tokens, gain = str(row["tokens"]), number(row["gain"], ".3f", "x")
        shown.add_row(row["kind"], shape, tokens, row["note"], rate, gain)
    return shown


def verdicts(result: Result) -> Table:
    """The targets."""
    shown = Table("target", "at least", "worst", "where", "best", "met", title="targets")
    for row in result["verdicts"]:
        worst, top = number(row["worst"]), number(row.get("best"))
        met = "yes" if row["met"] else "no"
        shown.add_row(row["target"], f"{row['least']:g}", worst, row.get("where", "-"), top, met)
    return shown


HEAD = (
    *("family", "kind", "ceiling", "operation", "library", "stage", "note"),
    *("tokens", "channels", "outputs"),
)
"""The columns that say which row it is."""


def problems(result: Result) -> list[str]:
    """Return one line for every part that failed and every row that has an error."""
    lines = [f"{part}: {error}" for part, error in result.get("errors", {}).items()]
    for part in ("rates", "ceilings", "compress", "gemm"):
        for row in result.get(part, []):
            if "error" in row:
                head = " ".join(str(row[name]) for name in HEAD if name in row)
                lines.append(f"{part}: {head}: {row['error']}")
    return lines
