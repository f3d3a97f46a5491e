"""Compare two plans: which sites differ, in what, and what the plans come to.

    2 of 224 projections differ

    pattern: 2:4 -> 4:8
    tensor factor: F32 [4096] -> F32 [4096], differs by 3.1%
        model.layers.0.mlp.down_proj
        model.layers.1.mlp.down_proj

                   before                            after
    sparse         96, 61.5% of the linear weights   98, 62.0% of the linear weights

Settings and quantisation are compared field by field, tensors by value: by how much of its norm
one differs, ‖a − b‖ / ‖a‖. Plans of one save share their tensors, which are then not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .plan import Plan, PlannedSite
from .plan_totals import PlanTotals
from .quantization import Quantization
from .settings import Settings


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs: its name, and its two values in words, None where it is absent."""

    what: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        return f"{self.what}: {self.before or 'none'} -> {self.after or 'none'}"


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """What differs between two plans.

    Attributes:
        sites: site -> its differences, sites that are alike left out.
        made: differences in who made them, how and when.
        before: totals of the first plan.
        after: totals of the second.
    """

    sites: Mapping[str, tuple[Difference, ...]]
    made: tuple[Difference, ...]
    before: PlanTotals
    after: PlanTotals

    @classmethod
    def of(cls, before: Plan, after: Plan) -> PlanDiff:
        """Compare two plans."""
        names = dict.fromkeys([*before.sites, *after.sites])
        found = {name: tuple(_site(name, before, after)) for name in names}
        made = tuple(_fields(dict(before.made), dict(after.made)))
        sites = {name: differences for name, differences in found.items() if differences}
        return cls(sites, made, PlanTotals.of(before), PlanTotals.of(after))

    @property
    def equal(self) -> bool:
        """Whether the plans do the same; who made them may differ."""
        return not self.sites

    def to_json(self) -> dict[str, Any]:
        """Return the differences as plain JSON values."""
        return {
            "equal": self.equal,
            "sites": {name: [_plain(one) for one in own] for name, own in self.sites.items()},
            "made": [_plain(one) for one in self.made],
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }

    def __str__(self) -> str:
        groups: dict[tuple[Difference, ...], list[str]] = {}
        for name, differences in self.sites.items():
            groups.setdefault(differences, []).append(name)
        count = max(self.before.sites, self.after.sites)
        lines = [f"{len(self.sites)} of {count} projections differ" if groups else "equal"]
        for differences, names in groups.items():
            lines += ["", *map(str, differences), *(f"    {name}" for name in names)]
        rows = [("", "before", "after")]
        for (what, one), (_, other) in zip(self.before.lines(), self.after.lines(), strict=True):
            rows.append((what, one, other))
        lines += ["", *columns(rows)]
        lines += ["", "made", *(f"    {one}" for one in self.made)] if self.made else []
        return "\n".join(lines)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows of cells as lines, the cells of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["   ".join(row).rstrip() for row in padded]


def _site(name: str, before: Plan, after: Plan) -> Iterator[Difference]:
    one, other = before.sites.get(name), after.sites.get(name)
    if one is None or other is None:
        words = (None if site is None else _words(site) for site in (one, other))
        yield Difference("projection", *words)
        return
    yield from _fields(_shown(one), _shown(other))
    if before.tensors != after.tensors:
        yield from _tensors(name, before, after)


def _words(site: PlannedSite) -> str:
    dense = site.choice if isinstance(site.choice, Settings) else f"dense: {site.choice}"
    return f"{list(site.shape)}, {dense}"


def _shown(site: PlannedSite) -> dict[str, Any]:
    """Return what is compared of a site, by name."""
    values: dict[str, Any] = {"shape": list(site.shape)}
    if isinstance(site.choice, Settings):
        values |= {"input": "sparse", **site.choice.to_json()}
    else:
        values |= {"input": f"dense: {site.choice}"}
    if isinstance(site.quantization, Quantization):
        own = site.quantization.to_json()
        values |= {"quantize": own.pop("dtype"), **own}
    elif site.quantization is not None:
        values["quantize"] = f"16 bit: {site.quantization}"
    moves = [f"{move.parameter} from {move.start}" for move in site.moves]
    return values | {"permutes": ", ".join(moves) or None}


def _fields(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Difference]:
    for what in dict.fromkeys([*before, *after]):
        one, other = before.get(what), after.get(what)
        if one != other:
            yield Difference(what, _text(one), _text(other))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _tensors(site: str, before: Plan, after: Plan) -> Iterator[Difference]:
    for name in dict.fromkeys([*before.tensors.names(site), *after.tensors.names(site)]):
        one, other = before.tensors.get(site, name), after.tensors.get(site, name)
        first, second = before.tensors.words(site, name), after.tensors.words(site, name)
        if one is None or other is None or first != second:
            yield Difference(f"tensor {name}", first, second)
        elif not torch.equal(one, other):
            yield Difference(f"tensor {name}", first, f"{second}, {_distance(one, other)}")


def _distance(one: torch.Tensor, other: torch.Tensor) -> str:
    """Return in words how far two tensors of one form are apart."""
    if not one.is_floating_point():
        return f"differs in {int((one != other).sum())} of {one.numel()} values"
    apart, norm = (one.double() - other.double()).norm().item(), one.double().norm().item()
    return f"differs by {apart / norm:.2g} of its norm" if norm else "differs"


def _plain(one: Difference) -> dict[str, str | None]:
    return {"what": one.what, "before": one.before, "after": one.after}
