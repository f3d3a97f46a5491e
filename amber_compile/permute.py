"""Put a model's channels into the order that a plan was made for, and back.

    permute_channels(model, plan)                  before torch.compile; once
    permute_channels(model, plan, undo=True)       the model is what it was, bit for bit

The rows of the weights that make the channels of a site and the columns of its own weight are
permuted alike, in place, as ``moves`` of the plan say; the model computes what it did, but for the
order in which products are summed. Which moves are exact is read off the graph
(passes/find_permutations.py) when the plan is made. Keys and values in a cache are permuted too, so
a cache goes with the model that filled it.

The plan keeps the first row of each weight as it is once permuted. So a model that is permuted
already is left alone, and one that is neither permuted nor as the plan knew it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .errors import PlanError
from .plan import Move, Plan, PlannedSite
from .plan_tensors import PlanTensors

State = Literal["original", "permuted", "unknown"]
WRONG: Mapping[State, str | None] = {
    "permuted": None,
    "original": "its channels are not permuted: call permute_channels(model, plan) first",
    "unknown": "its weight is neither the one that the plan was made for nor that one permuted",
}
Step = tuple[torch.Tensor, int, torch.Tensor]
"""A parameter, one of its dimensions, and where each slice of it comes from."""
CLOSE, TINY = 2.0**-7, 2.0**-24
"""How far a weight may be from another that went through bfloat16 or float16, or both."""


@dataclass(frozen=True, slots=True)
class Permuted:
    """What was done to a model.

    Attributes:
        changed: the sites whose channels were moved.
        left: the sites that were in the wanted order already.
        parameters: how many parameters were written.
    """

    changed: tuple[str, ...]
    left: tuple[str, ...]
    parameters: int

    def __str__(self) -> str:
        what = f"{len(self.changed)} sites moved, in {self.parameters} parameters"
        return f"{what}; {len(self.left)} were in order already" if self.left else what


def permute_channels(model: nn.Module, plan: Plan, *, undo: bool = False) -> Permuted:
    """Permute the channels of ``model`` in place as ``plan`` has them, or back.

    Raises:
        PlanError: before anything is changed, if a weight is neither as the plan knew it nor as it
            is once permuted, or a parameter is missing, of another size, or no plain tensor.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    steps: dict[str, list[Step]] = {}
    left: list[str] = []
    for site, planned in plan.sites.items():
        if plan.tensors.get(site, "permutation") is None:
            continue
        found = _steps(site, planned, plan.tensors, tensors, undo=undo)
        if found:
            steps[site] = found
        else:
            left.append(site)
    for moves in steps.values():
        _apply(moves)
    written = {id(parameter) for moves in steps.values() for parameter, _, _ in moves}
    return Permuted(tuple(steps), tuple(left), len(written))


def why_not_permuted(weight: torch.Tensor, tensors: PlanTensors, site: str) -> str | None:
    """Return why ``weight`` [N, K] is not in the order of the plan, or None if it is.

    A weight without values cannot tell: None.
    """
    if tensors.get(site, "first_row") is None or tensors.get(site, "permutation") is None:
        return "the plan does not say how its channels are permuted"
    if weight.is_meta or isinstance(weight, FakeTensor):
        return None
    return WRONG[_state(weight, tensors, site)]


def permutation_tensors(weight: torch.Tensor, permutation: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a plan keeps of a permutation of the columns of ``weight`` [N, K].

    Raises:
        PlanError: if it is no permutation, or the first row does not tell whether it was done.
    """
    order = permutation.long().cpu()
    if not torch.equal(order.sort().values, torch.arange(weight.shape[-1])):
        raise PlanError(f"a permutation of {weight.shape[-1]} channels must hold each of them once")
    row = weight.detach()[0].cpu()
    permuted = row[order].bfloat16()
    if _close(row, permuted):
        raise PlanError(
            "its first row is the same in the new order: it would not tell whether a model is "
            "permuted"
        )
    return {"permutation": order.int(), "first_row": permuted}


def join_orders(orders: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    """Return the permutation of all channels of a site, int32, for the ``orders`` within it.

    Args:
        orders: [groups, size], a permutation of ``size`` in each row.
        repeats: heads in a row that share an order: those of the first move of the site.
    """
    groups, size = orders.shape
    starts = size * torch.arange(groups * repeats).view(groups, repeats, 1)
    return (orders[:, None, :] + starts).flatten().int()


def split_orders(permutation: torch.Tensor, own: Move) -> torch.Tensor | None:
    """Return the orders [groups, size] of which :func:`join_orders` makes ``permutation``.

    ``own`` is the first move of the site. None if it moves channels between heads, or permutes
    heads differently that share their values.
    """
    if len(permutation) % (own.repeats * own.step):
        return None
    heads = permutation.long().view(-1, own.repeats, own.step)
    starts = own.repeats * own.step * torch.arange(len(heads))
    orders = heads[:, 0] - starts[:, None]
    if not torch.equal(orders.sort(dim=-1).values, torch.arange(own.step).expand_as(orders)):
        return None
    same = torch.equal(join_orders(orders, own.repeats).long(), permutation.long())
    return orders if same else None


def index_of(size: int, move: Move, orders: torch.Tensor) -> torch.Tensor:
    """Return where each of ``size`` slices comes from when ``move`` permutes some by ``orders``."""
    heads = move.start + move.step * torch.arange(len(orders) * move.repeats)
    places = heads.view(len(orders), move.repeats, 1)
    index = torch.arange(size)
    index[(places + torch.arange(orders.shape[1])).flatten()] = (
        places + orders[:, None, :]
    ).flatten()
    return index


# ---- parameters ----------------------------------------------------------------------------------


def _steps(
    site: str,
    planned: PlannedSite,
    tensors: PlanTensors,
    parameters: Mapping[str, torch.Tensor],
    *,
    undo: bool,
) -> list[Step]:
    """Return what is to be permuted for one site; nothing if it is in order already."""
    permutation = tensors.get(site, "permutation")
    if not planned.moves or permutation is None:
        raise PlanError(f"site {site!r}: the plan does not say what its permutation moves")
    own = planned.moves[0]
    found = [_parameter(parameters, move, site) for move in planned.moves]
    weight = found[0] if own.dim == 1 else found[0].transpose(0, 1)
    state = _state(weight, tensors, site)
    if state == "unknown":
        raise PlanError(f"site {site!r}: {WRONG[state]}")
    if state == ("original" if undo else "permuted"):
        return []
    orders = split_orders(permutation, own)
    if orders is None:
        raise PlanError(f"site {site!r}: its permutation moves channels from head to head")
    orders = orders.argsort(dim=-1) if undo else orders
    pairs = zip(found, planned.moves, strict=True)
    return [(one, move.dim, _index(one, move, orders, site)) for one, move in pairs]


def _parameter(tensors: Mapping[str, torch.Tensor], move: Move, site: str) -> torch.Tensor:
    """Return the parameter that ``move`` names."""
    found = tensors.get(move.parameter)
    where = f"site {site!r}: its permutation moves {move.parameter!r}, which"
    if found is None:
        raise PlanError(f"{where} the model does not have")
    if found.is_meta or type(found.data) is not torch.Tensor:
        raise PlanError(f"{where} is no plain tensor with values")
    shared = [
        name
        for name, other in tensors.items()
        if other is not found
        and other.untyped_storage().data_ptr() == found.untyped_storage().data_ptr()
    ]
    if shared:
        raise PlanError(f"{where} shares its memory with {shared[0]!r}")
    return found


def _index(parameter: torch.Tensor, move: Move, orders: torch.Tensor, site: str) -> torch.Tensor:
    """Return where each slice of ``parameter`` along ``move.dim`` comes from."""
    groups, size = orders.shape
    end = move.start + move.step * (groups * move.repeats - 1) + size
    if move.dim >= parameter.dim() or end > parameter.shape[move.dim]:
        raise PlanError(
            f"site {site!r}: its permutation moves {move.parameter!r}, whose shape "
            f"{list(parameter.shape)} is too small for it"
        )
    return index_of(parameter.shape[move.dim], move, orders)


def _apply(steps: Sequence[Step]) -> None:
    """Permute the parameters of one site: all of them, or none if that fails."""
    done: list[Step] = []
    try:
        for parameter, dim, index in steps:
            _permute(parameter, dim, index)
            done.append((parameter, dim, index.argsort()))
    except BaseException:
        for parameter, dim, index in reversed(done):
            _permute(parameter, dim, index)
        raise


@torch.no_grad()
def _permute(parameter: torch.Tensor, dim: int, index: torch.Tensor) -> None:
    parameter.copy_(parameter.index_select(dim, index.to(parameter.device)))


# ---- the state of a model ------------------------------------------------------------------------


def _state(weight: torch.Tensor, tensors: PlanTensors, site: str) -> State:
    """Tell by its first row whether ``weight`` [N, K] is permuted."""
    row, permutation = tensors.get(site, "first_row"), tensors.get(site, "permutation")
    if row is None or permutation is None or weight.shape[-1] != len(row):
        return "unknown"
    first = weight.detach()[0].cpu()
    if _close(first, row):
        return "permuted"
    return "original" if _close(first, row[permutation.long().argsort()]) else "unknown"


def _close(row: torch.Tensor, kept: torch.Tensor) -> bool:
    """Whether a row is the one that was kept in bfloat16, whatever 16 bits it went through."""
    one, other = row.float(), kept.float()
    return bool(((one - other).abs() <= CLOSE * other.abs() + TINY).all())
