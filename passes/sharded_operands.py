"""Sparsify what enters a projection whose weight is spread over processes (``DTensor``).

    y = linear(x, w.to_local())      ->   s = nm_select(x, factor, n, m);  y = linear(s, …)
    y = linear(x, w)                 ->   s = nm_select(x.to_local(), factor, n, m)
                                          s = laid_out_like(s, x);         y = linear(s, w)

    channels spread and a correction ->   nm_select_sharded in the place of nm_select

The first is a model that goes down to local tensors by itself (Hugging Face's ``tp_plan``), the
second PyTorch's ``parallelize_module``. A plain ``x`` beside a weight with its channels spread is
this process's slice of the channels: a product of anything else has no meaning. ``factor`` is this
process's part (``amber_compile/shards.py``).

A process that holds shards as plain tensors tells nobody, and its factors would be those of a part
of the weight. So where a graph communicates and no weight of it is a ``DTensor``, plain weights are
not taken for whole ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.graph import insert_call
from amber_compile.projection import Projection, fake, value_of
from amber_compile.settings import Settings
from amber_compile.shards import (
    is_sharded,
    laid_out_like,
    local_of,
    sharded_dims,
    slices_of,
    why_not_cut,
)

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


def why_not_sharded(projection: Projection, settings: Settings) -> str | None:
    """Return what prevents a projection from being sparsified on several processes, or None."""
    weight = fake(projection.weight)
    if not is_sharded(weight):
        return _why_not_whole(projection.node.graph)
    if projection.transposed:
        return "its weight is a DTensor stored [K, N]; valid: [N, K]"
    if settings.part == "gate" and not _shows_gate(projection):
        return "part='gate' of a DTensor whose gate rows are not spread apart from the others"
    if asked := [name for name in settings.tensors if name != "factor"]:
        return f"the plan's {', '.join(asked)} of a DTensor"
    return why_not_cut(weight, settings.pattern.m) or _why_not_laid_out(projection)


def _shows_gate(projection: Projection) -> bool:
    """Whether the first rows of each process are its part of the first rows of all."""
    weight: Any = fake(projection.weight)
    cut = {axis for axis, dim in sharded_dims(weight).items() if dim == weight.dim() - 2}
    halved = all(getattr(weight.placements[axis], "split_factor", 1) == 2 for axis in cut)
    return halved and not is_sharded(fake(projection.x))


def gate_rows_of_whole(projection: Projection) -> int | None:
    """Return how many rows of the whole weight are the gate, from how many are one process's."""
    weight = fake(projection.weight)
    if projection.gate_rows is None or not is_sharded(weight):
        return projection.gate_rows
    return projection.gate_rows * int(weight.shape[-2] // local_of(weight).shape[-2])


def _why_not_whole(graph: Graph) -> str | None:
    """Return why a plain weight may be a shard of one, or None."""
    if not communicates(graph):
        return None
    if any(is_sharded(value_of(node)) for node in graph.find_nodes(op="placeholder")):
        return None
    return (
        "the graph exchanges tensors with other processes, and its weight, a plain tensor, may be "
        "a shard; a DTensor says what it is"
    )


def communicates(graph: Graph) -> bool:
    """Whether some node exchanges tensors with other processes."""
    functional = torch.ops._c10d_functional
    packets = [getattr(functional, name) for name in COLLECTIVES]
    targets = [*packets, *(packet.default for packet in packets)]
    return any(graph.find_nodes(op="call_function", target=one) for one in targets)


def _why_not_laid_out(projection: Projection) -> str | None:
    """Return why ``x`` does not match its weight, or None."""
    x: Any = fake(projection.x)
    weight: Any = fake(projection.weight)
    if not is_sharded(x):
        if x.shape[-1] != local_of(weight).shape[-1]:
            return f"its input has {x.shape[-1]} channels, its weight here {local_of(weight).shape}"
        return None
    laid_out = f"its input is laid out as {x.placements}, its weight as {weight.placements}"
    if x.device_mesh != weight.device_mesh or any(own.is_partial() for own in x.placements):
        return laid_out
    cut, of_weight = sharded_dims(x), sharded_dims(weight)
    channels = {axis for axis, dim in cut.items() if dim == x.dim() - 1}
    if channels != {axis for axis, dim in of_weight.items() if dim == weight.dim() - 1}:
        return laid_out
    if len(cut) > len(channels):
        return "its tokens are spread over processes"
    return None


def channels_here(projection: Projection) -> int:
    """Return how many channels ``x`` has as the graph shows it: those of one process, or all."""
    weight = fake(projection.weight)
    if is_sharded(weight) and not is_sharded(fake(projection.x)):
        return int(local_of(weight).shape[-2 if projection.transposed else -1])
    return projection.channels


def why_not_fused(projection: Projection, settings: Settings) -> str | None:
    """Return why the selection is not directly what the product reads, or None."""
    weight = fake(projection.weight)
    if is_sharded(fake(projection.x)):
        return "its input is a DTensor"
    if is_sharded(weight) and slices_of(weight) and settings.correction:
        return "its correction sums over processes"
    return None


def insert_selection(
    graph: Graph,
    projection: Projection,
    x: Node,
    factor: Node | None,
    settings: Settings,
    rows: int,
    offsets: Node | None,
) -> Node:
    """Insert the selection from ``x`` that ``projection`` is to read, and return it."""
    site, weight = projection.node, fake(projection.weight)
    slices = slices_of(weight) if is_sharded(weight) else None
    is_spread = is_sharded(fake(x))
    local = insert_call(graph, site, "to_local", x) if is_spread else x
    target: Any = torch.ops.amber.nm_select.default
    pattern, correction = settings.pattern, settings.correction
    arguments: tuple[Any, ...]
    arguments = (factor, pattern.n, pattern.m, correction, settings.dense_prefix, rows, offsets)
    if slices is not None and correction is not None:
        target = torch.ops.amber.nm_select_sharded.default
        arguments = (*arguments, projection.channels, slices.group)
    selected = insert_call(graph, site, target, local, *arguments)
    return insert_call(graph, site, laid_out_like, selected, x) if is_spread else selected
