"""Tell whose weights a call of a shared graph brings, and so which variant of the graph it runs.

Layers compiled one by one share a graph. Each layer of a registered model is an *owner* of it: the
qualified names of its projections, what the plan makes of them, and the variant that does so. Of a
whole model, or one that is not registered, there is one owner, whatever weights come.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from .analysis import Analysis, Names
from .binding import Compiled, Variant, Weights
from .checked import Checked
from .graph import copy_graph, positions
from .naming import full_name
from .report import GraphReport, Site
from .rewrite import Rewritten


@dataclass(frozen=True)
class Built:
    """A variant; why it runs dense, if it failed; for ``check=True`` an uncompiled copy."""

    variant: Variant
    failure: str | None = None
    twin: Rewritten | None = None


class Owners:
    """Choose the variant of the owner of some weights; holds no weight itself.

    Args:
        analysis: of the shared graph.
        built: each owner's variant, that of the example inputs first.
        sites: each owner's rows of the report, added to it when the owner first calls.
        report: of the graph.

    Attributes:
        watched: argument positions of the weights to choose by.
        dense: the graph as it is, uncompiled: for weights that have no variant.
    """

    def __init__(
        self,
        analysis: Analysis,
        built: Mapping[Names, Built],
        sites: Mapping[Names, Sequence[Site]],
        report: GraphReport,
    ) -> None:
        self.dense = _uncompiled(analysis.gm)
        self._built = built
        self._sites = sites
        self._report = report
        self._local = tuple(projection.name for projection in analysis.projections)
        at = positions(analysis.gm)
        named = [one for one, site in enumerate(analysis.projections) if site.weight in at]
        self._owners = {tuple(names[one] for one in named): names for names in built}
        self._named = tuple(self._local[one] for one in named)
        self._unseen = set(built)
        scored = [one.position for one in built[analysis.names[0]].variant.derived]
        self.watched = analysis.positions if len(built) > 1 else tuple(dict.fromkeys(scored))

    def __call__(self, weights: Weights) -> Variant | None:
        names = self._owner(weights)
        if names is None:
            warnings.warn(
                f"amber: {self._local[0]} and its neighbours belong to no registered model: they "
                "run dense and uncompiled. Call amber_compile.register_model(model) first",
                stacklevel=2,
            )
            return None
        variant = self._built[names].variant
        if names not in self._unseen:
            return variant
        self._unseen.remove(names)
        known = {site.name for site in self._report.sites}
        self._report.sites += [site for site in self._sites[names] if site.name not in known]
        return self._checked(names, variant)

    def _owner(self, weights: Weights) -> Names | None:
        """Return the names that ``weights`` have; those of the only owner belong to any."""
        if len(self._built) == 1:
            return next(iter(self._built))
        return self._owners.get(tuple(map(full_name, self._named, weights)))

    def _checked(self, names: Names, variant: Variant) -> Variant:
        """Return ``variant``, to be measured on its first call if that was asked for."""
        twin = self._built[names].twin
        if twin is None:
            return variant
        full = dict(zip(self._local, names, strict=True))
        checked = Checked(variant.compiled, self.dense, twin, full, self._report)
        return Variant(checked, variant.derived)


def _uncompiled(gm: GraphModule) -> Compiled:
    """Return what runs ``gm`` as it is: a copy without Dynamo's records, which are large."""
    copy = copy_graph(gm)[0]
    for node in copy.graph.nodes:
        node.meta = {}
    forward: Compiled = copy.forward
    return forward
