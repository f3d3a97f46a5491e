"""Complete a plan whose sites are to be permuted, before it is saved.

    plan = permuted_plan(plan, permutable(model, ids, kwargs={"use_cache": False}), weights)

Calibration decides on an order of the input channels of a site, as its tensor ``permutation``, and
writes what belongs to these channels in that order. This adds what moves along, and how the weight
looks afterwards; and it puts what the plan holds for the *outputs* of weights that move along in
the new order too: their output scales and biases, and the rows of their second weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from .errors import PlanError
from .passes.find_permutations import Permutable
from .permute import index_of, permutation_tensors, split_orders
from .plan import Plan, PlannedSite
from .plan_tensors import PlanTensors
from .settings import Settings

OUTPUTS = {"output_scale": -1, "output_bias": -1, "weight": -2}
"""Tensors of a plan that have a row for each output of a site, and in which dimension."""


def permuted_plan(
    plan: Plan,
    permutations: Mapping[str, Permutable | str],
    weights: Mapping[str, torch.Tensor],
) -> Plan:
    """Return ``plan`` as :func:`amber_compile.permute_channels` needs it.

    Args:
        plan: with a tensor ``permutation`` for the sites to permute. One that leaves all channels
            where they are is dropped.
        permutations: what may be permuted: :func:`amber_compile.permutable.permutable`.
        weights: of the sites to permute, [N, K], not permuted yet.

    Raises:
        PlanError: if a site cannot be permuted, or not like this.
    """
    tensors, sites = plan.tensors.to_dict(), dict(plan.sites)
    for site in plan.tensors.sites:
        order = tensors[site].get("permutation")
        if order is None:
            continue
        if torch.equal(order, torch.arange(len(order), dtype=order.dtype)):
            del tensors[site]["permutation"]
            sites[site] = _with(sites[site], permuted=False)
            continue
        found = permutations.get(site, "it is no projection of the model")
        if isinstance(found, str):
            raise PlanError(f"site {site!r} cannot be permuted: {found}")
        sites[site] = replace(_with(sites[site], permuted=True), moves=found.moves)
        try:
            tensors[site] |= permutation_tensors(weights[site], order)
        except PlanError as cause:
            raise PlanError(f"site {site!r} cannot be permuted: {cause}") from cause
        _follow(site, found, order, tensors)
    return Plan(sites, plan.made, PlanTensors({name: own for name, own in tensors.items() if own}))


def _with(site: PlannedSite, *, permuted: bool) -> PlannedSite:
    if not isinstance(site.choice, Settings):
        return site
    return replace(site, choice=replace(site.choice, permuted=permuted))


def _follow(
    site: str, found: Permutable, order: torch.Tensor, tensors: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Permute what the plan holds for the outputs of the weights that move along with ``site``."""
    own, *others = found.moves
    orders = split_orders(order, own)
    if orders is None:
        raise PlanError(f"site {site!r}: its permutation moves channels from head to head")
    for move in others:
        held = tensors.get(move.parameter.removesuffix(".weight").removesuffix(".base_layer"), {})
        if not move.parameter.endswith(".weight"):
            continue  # a bias is no site
        for name in OUTPUTS.keys() & held.keys():
            dim = held[name].dim() + OUTPUTS[name]
            index = index_of(held[name].shape[dim], move, orders)
            held[name] = held[name].index_select(dim, index)
