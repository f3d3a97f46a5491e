"""The sites of a report as rows of a table and as cells of a heat map.

             q_proj   k_proj   …            columns: the projections, by their names in a layer
layers.0     2:4      –                     rows: the layers
layers.1     2:4      –
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amber_compile.report import Report, Site
from amber_compile.sketch import layer_path

STEPS = 10
"""Shades of the heat map, besides that of nothing."""
UNCOUNTED = ("head", "router")
"""Roles that coverage leaves out."""


@dataclass(frozen=True, slots=True)
class Row:
    """A site as the page shows it.

    Attributes:
        name: qualified name.
        layer: path of its layer, or "".
        leaf: its name below the layer.
        weight: sizes, ``4096x4096``.
        pattern: ``2:4``; "" if dense.
        how: its settings, or the reason it stays dense.
        format: in what its product is computed, and why not in eight bits; "" if nobody asked.
        kernel: what runs it, or "".
        macs: its share of the MACs that count, 0 to 1; 0 for heads and routers.
        coverage: part of its outputs that reads a sparse activation, 0 to 1.
        removed: part of its MACs that meet a dropped zero, 0 to 1.
        error: relative output error, if it was measured.
    """

    name: str
    layer: str
    leaf: str
    weight: str
    pattern: str
    how: str
    format: str
    kernel: str
    macs: float
    coverage: float
    removed: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """Return what the scripts of the page need."""
        error = None if self.error is None else f"{self.error:.4f}"
        shown = {name: getattr(self, name) for name in ("name", "layer", "leaf", "weight", "how")}
        macs = f"{self.macs:.2%}" if self.macs else "not counted"
        more = {name: getattr(self, name) for name in ("format", "kernel")}
        more["pattern"] = self.pattern or "dense"
        return {**shown, **more, "macs": macs, "error": error}


@dataclass(frozen=True, slots=True)
class Cell:
    """A site in the heat map: its row's index, and a shade for each of the measures."""

    at: int
    row: Row
    coverage: int
    removed: int
    error: int


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The sites of the layers; ``lines`` have a cell or None for each of ``columns``.

    Attributes:
        columns: name below the layer, and the shortest part of it that tells it from the others.
        lines: path of a layer, and its cells.
        others: indices of the rows of sites outside of layers.
        worst: the largest error, which has the darkest shade.
    """

    columns: list[tuple[str, str]]
    lines: list[tuple[str, list[Cell | None]]]
    others: list[int]
    worst: float


def rows_of(report: Report) -> list[Row]:
    """Return the sites of ``report`` as rows."""
    sites = report.sites
    total = sum(site.macs for site in sites if site.role not in UNCOUNTED)
    return [_row(site, total) for site in sites]


def _row(site: Site, total: float) -> Row:
    settings, remark = site.decision.settings, site.decision.unquantized or site.smoothing
    layer = layer_path(site.name)
    counts = total and site.role not in UNCOUNTED
    return Row(
        name=site.name,
        layer=layer,
        leaf=site.name.removeprefix(f"{layer}.") if layer else site.name,
        weight="x".join(map(str, site.shape)),
        pattern=str(settings.pattern) if settings else "",
        how=settings.how if settings else " ".join(str(site.decision.reason).split()),
        format=": ".join(filter(None, [site.format, remark])),
        kernel=site.kernel,
        macs=site.macs / total if counts else 0.0,
        coverage=site.share,
        removed=site.share * (1 - site.decision.density),
        error=site.error,
    )


def heat_map(rows: Sequence[Row]) -> HeatMap:
    """Lay out the rows that belong to layers; errors are shaded up to the largest."""
    inside = [(at, row) for at, row in enumerate(rows) if row.layer]
    leaves = list(dict.fromkeys(row.leaf for _, row in inside))
    errors = [row.error for _, row in inside if row.error and math.isfinite(row.error)]
    worst = max(errors, default=0.0)
    lines: dict[str, list[Cell | None]] = {}
    for at, row in inside:
        line = lines.setdefault(row.layer, [None] * len(leaves))
        shades = [_shade(row.coverage), _shade(row.removed), _shade(row.error or 0.0, worst)]
        line[leaves.index(row.leaf)] = Cell(at, row, *shades)
    others = [at for at, row in enumerate(rows) if not row.layer]
    return HeatMap(_short(leaves), list(lines.items()), others, worst)


def _shade(value: float, most: float = 1.0) -> int:
    """Return 0 for nothing, 1 for little, ``STEPS`` for ``most`` and what is more or no number."""
    if value != value or value > most:
        return STEPS
    return math.ceil(STEPS * value / most) if most else 0


def _short(leaves: Sequence[str]) -> list[tuple[str, str]]:
    ends = [leaf.rpartition(".")[2] for leaf in leaves]
    return [
        (leaf, end if ends.count(end) == 1 else leaf)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
