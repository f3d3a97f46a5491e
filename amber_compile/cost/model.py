"""What a model's projections cost, dense and sparse, as expressions in the token count.

    cost = cost_of(report, "H100 SXM")
    print(cost)                      # a table: a line for projections that are alike
    cost.sparse.seconds              # a sympy expression in T
    cost.speedup(2048), cost.break_even

What a projection runs as is in site.py, what that takes in kernel.py. As in the report,
heads and routers are listed and not counted. Nothing is decided by this model: it is for people,
and for choosing ``min_tokens``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Expr

from amber_compile.errors import OptionError, choices
from amber_compile.report import Report, Site
from amber_compile.settings import Settings

from .kernel import Kernels
from .rates import Rates, rates_of
from .site import dense_work, format_of, sparse_work
from .table import cost_table
from .work import Comparison, Work

TOKENS = (512, 2048, 8192)
"""The token counts of a table and of JSON."""
UNCOUNTED = ("head", "router")
"""Roles that the report's coverage leaves out, and so do these totals."""


@dataclass(frozen=True)
class SiteCost(Comparison):
    """Projections that are alike: ``dense`` and ``sparse`` are what all of them do together.

    Attributes:
        label: role and shape, such as ``q 4096x4096``.
        sites: the projections, of one shape and under one decision.
        one: what one of them does.
    """

    label: str
    sites: Sequence[Site]
    one: Comparison

    @property
    def role(self) -> str:
        """What they are called: their role, else the end of their name."""
        return _role(self.sites[0])

    @property
    def settings(self) -> Settings | None:
        """How they select; None if they are dense."""
        return self.sites[0].decision.settings

    @property
    def changed(self) -> bool:
        """Whether they are sparse or quantised."""
        return self.sites[0].decision.rewritten

    @property
    def counted(self) -> bool:
        """Whether the totals include them."""
        return self.sites[0].role not in UNCOUNTED

    def to_json(self, tokens: Iterable[int] = TOKENS) -> dict[str, Any]:
        """Return names, formulas (in T, rounded), break-even and speed-ups as JSON values."""
        return {
            "label": self.label,
            "names": [site.name for site in self.sites],
            "shape": list(self.sites[0].shape),
            "settings": self.settings.to_json() if self.settings else None,
            "format": format_of(self.sites[0]),
            "counted": self.counted,
            "dense_kernels": _kernels_to_json(self.one.dense),
            "sparse_kernels": _kernels_to_json(self.one.sparse),
            **_compared(self, tokens),
        }


@dataclass(frozen=True)
class ModelCost(Comparison):
    """All counted projections of a model on one machine; ``str()`` is a table.

    ``dense`` is what they cost without Amber, ``sparse`` as they were decided: quantised, too.

    Attributes:
        rates: of the machine.
        dtype: of activations and weights.
        groups: projections that are alike, in the model's order.
    """

    rates: Rates
    dtype: str
    groups: Sequence[SiteCost]

    @property
    def coverage(self) -> float:
        """Share of the dense multiply-accumulates that read a sparse activation, 0 to 1."""
        return self._share(lambda site: site.share)

    @property
    def removed(self) -> float:
        """Share of them that meet a dropped zero, executed or not, 0 to 1."""
        return self._share(lambda site: site.share * (1 - site.decision.density))

    def group_of(self, name: str) -> SiteCost:
        """Return the group of a projection, by its qualified name, or by the group's label.

        Raises:
            OptionError: if there is no such projection.
        """
        for group in self.groups:
            if name == group.label or any(name == site.name for site in group.sites):
                return group
        names = [site.name for group in self.groups for site in group.sites]
        raise OptionError(
            choices("projection", name, [group.label for group in self.groups] + names)
        )

    def formula(self, name: str, *, dense: bool = False) -> Expr:
        """Return the seconds of one projection as an expression in T; ``readable`` prints it.

        Args:
            name: as for :meth:`group_of`.
            dense: as it would be without sparsity.
        """
        one = self.group_of(name).one
        return (one.dense if dense else one.sparse).seconds

    def to_json(self, tokens: Iterable[int] = TOKENS) -> dict[str, Any]:
        """Return rates, totals and groups as plain JSON values; formulas are text, rounded."""
        tokens = tuple(tokens)
        return {
            "rates": self.rates.to_json(),
            "dtype": self.dtype,
            "coverage": self.coverage,
            "removed": self.removed,
            **_compared(self, tokens),
            "groups": [group.to_json(tokens) for group in self.groups],
        }

    def __str__(self) -> str:
        return cost_table(self, TOKENS)

    def _share(self, part: Callable[[Site], float]) -> float:
        counted = [site for group in self.groups if group.counted for site in group.sites]
        total = sum(site.macs for site in counted)
        return sum(site.macs * part(site) for site in counted) / total if total else 0.0


def cost_of(
    model: Report | Iterable[Site],
    machine: Rates | str,
    dtype: str | torch.dtype = "bfloat16",
) -> ModelCost:
    """Return what the projections of a model cost on a machine.

    Args:
        model: a report, or its sites.
        machine: rates, or the name of a machine whose rates come with the package.
        dtype: of activations and weights.

    Raises:
        OptionError: if the machine or the dtype is not known.
    """
    rates = rates_of(machine)
    kernels = Kernels(rates, rates.check_dtype(dtype))
    groups = _groups(model.sites if isinstance(model, Report) else model, kernels)
    counted = [group for group in groups if group.counted]
    return ModelCost(
        dense=Work.total(group.dense for group in counted),
        sparse=Work.total(group.sparse for group in counted),
        rates=rates,
        dtype=kernels.dtype,
        groups=groups,
    )


def _groups(sites: Iterable[Site], kernels: Kernels) -> list[SiteCost]:
    """Return the sites that are alike together, in the order in which they come."""
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        decided = site.decision.settings, format_of(site)
        key = _role(site), site.shape, site.macs, site.share, decided
        alike.setdefault(key, []).append(site)
    groups: list[SiteCost] = []
    for group in alike.values():
        label = f"{_role(group[0])} {'x'.join(map(str, group[0].shape))}"
        same = sum(other.label.partition(" #")[0] == label for other in groups)
        groups.append(_group(f"{label} #{same + 1}" if same else label, group, kernels))
    return groups


def _group(label: str, sites: Sequence[Site], kernels: Kernels) -> SiteCost:
    one = Comparison(dense_work(sites[0], kernels), sparse_work(sites[0], kernels))
    dense, sparse = one.dense.times(len(sites)), one.sparse.times(len(sites))
    return SiteCost(dense=dense, sparse=sparse, label=label, sites=tuple(sites), one=one)


def _role(site: Site) -> str:
    """Return what a projection is called among its like: its role, else the end of its name."""
    return site.name.rpartition(".")[2] if site.role == "unknown" else site.role


def _kernels_to_json(work: Work) -> list[dict[str, Any]]:
    return [
        {
            "name": kernel.name,
            "macs": _text(kernel.macs),
            "bytes": {what: _text(moved) for what, moved in kernel.traffic.items()},
            "seconds": _text(kernel.seconds),
        }
        for kernel, _ in work.kernels
    ]


def _compared(both: Comparison, tokens: Iterable[int]) -> dict[str, Any]:
    return {
        "dense_seconds": _text(both.dense.seconds),
        "sparse_seconds": _text(both.sparse.seconds),
        "break_even": both.break_even,
        "speedup": {str(count): both.speedup(count) for count in tokens},
    }


def _text(expression: Expr) -> str:
    return str(expression.evalf(6))
