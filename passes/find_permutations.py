"""Find the projections whose input channels may be put into another order, at no cost at run time.

    h = silu(linear(x, gate)) * linear(x, up)        y = linear(h, down)
        ->  gate[π], up[π], down[:, π]: the same y, and h in the order π

A permutation of the columns of a weight is exact if the rows of those weights that make the
channels follow, and everything in between treats all channels alike. The axes of all tensors are
followed through the graph (channel_flow.py): what mixes channels (a norm), tells them apart (RoPE),
reads their order or hands them out of the graph blocks them, and so does every operation that is
not known. Heads stay where they are: attention leads from v_proj to o_proj along the channels
within a head, which a group of queries shares with its keys and values:

    v[g·D + π_g],   o[:, (g·R + r)·D + π_g]     for heads r = 0..R-1 that read the values of g

Of two projections that would permute each other's weights the larger one is taken. Left alone, with
the reason: whatever reaches a residual stream, projections whose channels another one reads too,
experts, nested graphs, symbolic sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from amber_compile.naming import parameter_path
from amber_compile.passes.channel_axes import Axis, Dims, leaves, size_of
from amber_compile.passes.channel_flow import follow_channels
from amber_compile.plan import Move
from amber_compile.projection import Projection, fake, value_of

ORDER = "the order of its channels matters"


@dataclass(frozen=True, slots=True)
class Permutable:
    """A projection whose input channels may be permuted.

    Attributes:
        site: its qualified name.
        groups: how many permutations it takes, one for each group of heads; 1 without heads.
        size: how many channels each of them permutes.
        moves: what has to be permuted: the columns of its own weight first.
    """

    site: str
    groups: int
    size: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an axis lies in a dimension of a parameter: behind ``outer`` ones, ``step`` apart."""

    parameter: Node
    dim: int
    outer: tuple[Axis, ...] = ()
    start: int = 0
    step: int = 0
    known: bool = True


def find_permutations(
    gm: GraphModule, projections: Sequence[Projection]
) -> tuple[list[Permutable], dict[str, str]]:
    """Return the projections whose channels may be permuted, and why not for each other one."""
    if any(_is_symbolic(node) for node in gm.graph.nodes):
        return [], {one.name: "the graph has symbolic sizes" for one in projections}
    flow = follow_channels(gm)
    parameters = {
        node: dims
        for node, dims in flow.items()
        if node.op in ("placeholder", "get_attr") and isinstance(value_of(node), torch.nn.Parameter)
    }
    read = {(one.weight, _columns(one)): one.name for one in projections}
    outcomes = {one.name: _permutable(one, parameters, read) for one in projections}
    found: list[Permutable] = []
    once = {one.name: one for one in projections}.values()  # some are called twice
    for projection in sorted(once, key=lambda one: -one.macs):
        outcome = outcomes[projection.name]
        if isinstance(outcome, Permutable):
            reason = _why_not_both(outcome, found)
            if reason is None:
                found.append(outcome)
            else:
                outcomes[projection.name] = reason
    kept = [one for one in outcomes.values() if isinstance(one, Permutable)]
    return kept, {name: why for name, why in outcomes.items() if isinstance(why, str)}


def _permutable(
    projection: Projection,
    parameters: Mapping[Node, Dims],
    read: Mapping[tuple[Node, int], str],
) -> Permutable | str:
    """Return how the channels of one projection may be permuted, or why not."""
    if projection.unsupported:
        return projection.unsupported
    if len(projection.shape) != 2 or projection.weight not in parameters:
        return "its weight is no matrix of its own"
    own = projection.weight, _columns(projection)
    if projection.channels == 1:
        return "it has one channel"
    *heads, channels = leaves(parameters[own[0]][own[1]])
    reason = channels.blocked or ("it is cut into parts" if channels.parts else None)
    if reason:
        return f"{ORDER}: {reason}"
    places = list(_places(channels, parameters))
    dims = [(place.parameter, place.dim) for place in places]
    other = next((read[dim] for dim in dims if dim in read and dim != own), None)
    if other is not None:
        return f"{other} reads the same channels"
    if dims.count(own) != 1 or not all(place.known for place in places):
        return "its channels are grouped in a way that is not known"
    if len(places) == 1:
        reason = next((axis.blocked for axis in heads if axis.blocked), "no weight makes them")
        return f"{ORDER}: {reason}"
    common = _common([heads, *(list(place.outer) for place in places)])
    moves = tuple(
        Move(
            parameter_path(place.parameter),
            place.dim,
            place.start,
            place.step,
            size_of(place.outer[common:]),
        )
        for place in sorted(places, key=lambda place: (place.parameter, place.dim) != own)
    )
    return Permutable(projection.name, size_of(heads[:common]), channels.size, moves)


def _places(channels: Axis, parameters: Mapping[Node, Dims]) -> Iterator[_Place]:
    """Yield every place of an axis in the parameters."""
    for parameter, dims in parameters.items():
        for dim, axes in enumerate(dims):
            yield from _within(channels, leaves(axes), _Place(parameter, dim))


def _within(channels: Axis, axes: Sequence[Axis], at: _Place) -> Iterator[_Place]:
    """Yield the places of an axis among ``axes``, which begin at ``at``, and among their parts."""
    if not axes:
        return
    *before, last = axes
    if channels in before:
        yield replace(at, known=False)
    if before:  # behind outer ones already: two pitches
        at = replace(at, outer=(*at.outer, *before), step=last.size, known=not at.outer)
    if last is channels:
        yield at if at.outer else replace(at, step=last.size)
    for (start, _), part in last.parts.items():
        yield from _within(channels, leaves([part]), replace(at, start=at.start + start))


def _common(heads: Sequence[Sequence[Axis]]) -> int:
    """Return how many outer axes all places have in common, and in their order."""
    count = 0
    for axes in zip(*heads, strict=False):
        if axes[0].blocked or any(axis is not axes[0] for axis in axes):
            break
        count += 1
    return count


def _why_not_both(new: Permutable, found: Sequence[Permutable]) -> str | None:
    """Return why ``new`` does not go with one found before: no weight may be permuted twice.

    Its first row tells whether it is permuted (amber_compile/permute.py).
    """
    for other in found:
        if any(move.parameter == new.moves[0].parameter for move in other.moves):
            return f"its weight is permuted for {other.site}"
        if any(move.parameter == other.moves[0].parameter for move in new.moves):
            return f"it would permute the weight of {other.site}, which is permuted itself"
    return None


def _columns(projection: Projection) -> int:
    """Return which dimension of the stored weight holds the input channels."""
    return len(projection.shape) - 2 if projection.transposed else len(projection.shape) - 1


def _is_symbolic(node: Node) -> bool:
    value = value_of(node)
    if isinstance(value, torch.SymInt):
        return True
    return isinstance(value, torch.Tensor) and any(
        isinstance(size, torch.SymInt) for size in fake(node).shape
    )
