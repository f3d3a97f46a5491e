"""Calibrate a model in the order of channels that loses least, and leave it as it was.

    orders = find_orders(reader, weights, case, batches, permutable(model, ids))
    with ordered(model, orders):                  rows and columns are moved in place (permute.py)
        ...                                       all that is fitted here is in the new order
    orders.sparse(name, sparse)                   a site for the plan, with its permutation

An order is taken where it loses at most ``WORTHWHILE`` of what the channels lose as they stand.
Nothing is moved of a model that does not allow it (a parameter that shares its memory): that is
told before. What was moved is moved back bit for bit, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from amber_compile.passes.find_permutations import Permutable
from amber_compile.permute import permutation_tensors, permute_channels
from amber_compile.plan import Move, Plan, PlannedSite
from amber_compile.plan_tensors import PlanTensors

from .permutation import balanced_permutation, lost, token_samples
from .reading import Batches, Reader
from .selection import Sparse

WORTHWHILE = 0.95


@dataclass(frozen=True)
class Orders:
    """The sites whose channels get an order of their own.

    Attributes:
        tensors: "permutation" and "first_row" of each, as a plan holds them.
        moves: what has to be permuted for each.
        lost: share of the squared scores that each loses, before and after.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    moves: Mapping[str, tuple[Move, ...]] = field(default_factory=dict)
    lost: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def sparse(self, site: str, sparse: Sparse) -> Sparse:
        """Return ``sparse``, fitted to the model in order, as a plan has it."""
        if site not in self.tensors:
            return sparse
        settings = replace(sparse.settings, permuted=True)
        return Sparse(settings, {**sparse.tensors, **self.tensors[site]})

    def with_site(
        self,
        site: str,
        tensors: Mapping[str, Tensor],
        moves: tuple[Move, ...],
        share: tuple[float, float],
    ) -> Orders:
        """Return these orders and that of one more site."""
        return Orders(
            {**self.tensors, site: tensors},
            {**self.moves, site: moves},
            {**self.lost, site: share},
        )

    @property
    def plan(self) -> Plan:
        """A plan that permutes the model and makes nothing sparse."""
        sites = {
            site: PlannedSite((1, len(own["permutation"])), "ordered only", moves=self.moves[site])
            for site, own in self.tensors.items()
        }
        return Plan(sites, {}, PlanTensors(self.tensors))


def find_orders(
    reader: Reader,
    weights: Mapping[str, Tensor],
    case: Mapping[str, Sparse],
    batches: Batches,
    may: Mapping[str, Permutable | str],
    stage: str = "samples",
) -> Orders:
    """Return the orders of those sites of ``case`` that lose less for it.

    Args:
        reader: of the model, in its own order.
        weights: of the sites (observe.py).
        case: how each site would be sparse.
        batches: to read, of all ranks.
        may: how each site may be permuted, or why not (amber_compile.permutable).
        stage: name of the pass, for the file that keeps its progress.
    """
    allowed = {name: one for name, one in may.items() if isinstance(one, Permutable)}
    wanted = {name: case[name] for name in case if name in allowed and not case[name].settings.part}
    if not wanted:
        return Orders()
    samples = token_samples(reader, weights, wanted, batches, stage=stage)
    found = Orders()
    for name, squares in samples.items():
        own, pattern = allowed[name], wanted[name].settings.pattern
        repeats = own.moves[0].repeats
        order = balanced_permutation(squares, pattern.n, pattern.m, own.groups, repeats)
        before, after = squares, squares[:, order.long()]
        share = lost(before, pattern.n, pattern.m), lost(after, pattern.n, pattern.m)
        if share[1] <= WORTHWHILE * share[0]:
            weight = weights[name] if own.moves[0].dim == 1 else weights[name].transpose(0, 1)
            found = found.with_site(name, permutation_tensors(weight, order), own.moves, share)
    return found


@contextmanager
def ordered(model: nn.Module, orders: Orders) -> Iterator[None]:
    """Have the channels of ``model`` in order inside the block.

    Raises:
        PlanError: before anything is moved, if a parameter cannot be.
    """
    if not orders.tensors:
        yield
        return
    plan = orders.plan
    permute_channels(model, plan)
    try:
        yield
    finally:
        permute_channels(model, plan, undo=True)
