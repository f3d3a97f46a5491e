"""Tell whose weights a call of a shared graph brings, and so which variant of the graph it runs.

Layers compiled one by one share a graph. Each layer of a registered model is an *owner* of it: the
qualified names of its projections, what the plan makes of them, and the variant that does so. Of a
whole model, or one that is not registered, there is one owner, whatever weights come.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule

from .analysis import Analysis, Names
from .binding import Compiled, Release, Variant, Weights
from .checked import Checked
from .graph import copy_graph, positions
from .naming import full_name
from .rebuild import is_codes
from .report import GraphReport, Site
from .rewritten import Rewritten


@dataclass(frozen=True)
class Built:
    """A variant; why it runs dense, if it failed; for ``check=True`` an uncompiled copy.

    ``smoothing`` tells where smooth vectors are applied, by the names in the graph.
    """

    variant: Variant
    failure: str | None = None
    twin: Rewritten | None = None
    smoothing: Mapping[str, str] = field(default_factory=dict)


class Owners:
    """Choose the variant of the owner of some weights; holds no weight itself.

    Args:
        analysis: of the shared graph.
        built: each owner's variant, that of the example inputs first.
        sites: each owner's rows of the report, added to it when the owner first calls.
        report: of the graph.
        release: whether weights that only serve for their codes are released.

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
        release: bool = False,
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
        first = built[analysis.names[0]].variant
        scored = [one.position for one in first.derived] + list(first.reads if release else ())
        self.watched = analysis.positions if len(built) > 1 else tuple(dict.fromkeys(scored))
        wanted = analysis.config.decode is not None
        releases = {
            names: _releases(analysis, names, one.variant, sites[names]) if wanted else ()
            for names, one in built.items()
        }
        for one in itertools.chain.from_iterable(releases.values()):
            one.tell(None)  # for explain(), where nothing is bound and so nothing released
        self._releases = releases if release else dict.fromkeys(built, ())

    def __call__(self, weights: Weights) -> Variant | None:
        names = self._owner(weights)
        if names is None:
            warnings.warn(
                f"amber: {self._local[0]} and its neighbours belong to no registered model: they "
                "run dense and uncompiled. Call amber_compile.register_model(model) first",
                stacklevel=2,
            )
            return None
        full = dict(zip(self._local, names, strict=True))
        variant = replace(self._built[names].variant.at(full), releases=self._releases[names])
        if names not in self._unseen:
            return variant
        self._unseen.remove(names)
        known = {site.name for site in self._report.sites}
        self._report.sites += [site for site in self._sites[names] if site.name not in known]
        return self._checked(names, full, variant)

    def _owner(self, weights: Weights) -> Names | None:
        """Return the names that ``weights`` have; those of the only owner belong to any."""
        if len(self._built) == 1:
            return next(iter(self._built))
        return self._owners.get(tuple(map(full_name, self._named, weights)))

    def _checked(self, names: Names, full: dict[str, str], variant: Variant) -> Variant:
        """Return ``variant``, to be measured on its first call if that was asked for."""
        twin = self._built[names].twin
        if twin is None:
            return variant
        checked = Checked(variant.compiled, self.dense, twin, full, self._report)
        return replace(variant, compiled=checked)


def _releases(
    analysis: Analysis, names: Names, variant: Variant, sites: Sequence[Site]
) -> tuple[Release, ...]:
    """Return the weights that ``variant`` multiplies by their codes, and never by their values."""
    at, factors = positions(analysis.gm), analysis.factors(names)
    rows = {site.name: site for site in sites}
    coded = {one.position for one in variant.derived if is_codes(one.request)}
    releases = []
    for position in sorted(coded - set(variant.reads)):
        own = [
            place
            for place, projection in enumerate(analysis.projections)
            if at.get(projection.weight) == position
        ]
        also = tuple([factor for place in own if (factor := factors[place]) is not None])
        tell = _Tell(tuple([rows[names[place]] for place in own]))
        releases.append(Release(position, also, tell))
    return tuple(releases)


@dataclass(frozen=True)
class _Tell:
    """Write into rows of the report whether their weight was released."""

    sites: tuple[Site, ...]

    def __call__(self, kept: str | None) -> None:
        for site in self.sites:
            site.released = kept is None


def _uncompiled(gm: GraphModule) -> Compiled:
    """Return what runs ``gm`` as it is: a copy without Dynamo's records, which are large."""
    copy = copy_graph(gm)[0]
    for node in copy.graph.nodes:
        node.meta = {}
    forward: Compiled = copy.forward
    return forward
