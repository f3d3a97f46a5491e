"""Sparsify what enters a projection.

    y = linear(x, w)             ->  s = nm_select(x, factor, n, m);   y = linear(s, w)
    q = linear(x, wq)            ->  s = nm_select(x, None, n, m)      one selection for both,
    k = linear(x, wk)                q = linear(s, wq); k = linear(s, wk)    if it is the same
    gate, up = linear(x, w).chunk(2, -1)      under ``part="gate"``
                                 ->  gate = linear(s, w[:I]);   up = linear(x, w[I:])
    x = h.view(-1, K); y = linear(x, w)       under ``dense_prefix``, h [B, S, K]
                                 ->  s = nm_select(x.view_as(h), ...).view_as(x);  y = linear(s, w)

``factor`` (one number per channel, from the weight) becomes a further graph input: the caller
computes it once per weight and passes it on each call. Left alone: projections whose decision is
dense. A selection is not shared if anything writes to ``x`` in place, directly or through a view.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber
from amber_compile.decision import Decision
from amber_compile.derived import Key
from amber_compile.graph import add_input, insert_call, storage_of, written_storages
from amber_compile.passes.classify_phase import reshapes_of
from amber_compile.passes.fused_gate import halves_of
from amber_compile.projection import Projection, fake, fake_mode_of
from amber_compile.settings import Settings

Decided = Sequence[tuple[Projection, Decision]]


@dataclass(frozen=True, slots=True)
class FactorInput:
    """A graph input that holds a score factor of ``weight``, fp32 ``[K]`` or ``[E, K]``."""

    weight: Node
    key: Key


@dataclass
class Sparsified:
    """What the pass did: each site with the selection it reads, and the inputs it appended."""

    sites: list[tuple[Projection, Node]] = field(default_factory=list)
    factors: list[FactorInput] = field(default_factory=list)


def sparsify_projections(
    gm: GraphModule, decided: Decided, min_rows: Sequence[int] | None = None
) -> Sparsified:
    """Put an N:M selection in front of each projection decided sparse.

    ``min_rows[i]`` is how many rows the input of site ``i`` must have to be selected from; it is
    compared inside the operator, at run time, so that a symbolic count stays free of guards.
    """
    done = Sparsified()
    factors: dict[FactorInput, Node] = {}
    selections: dict[object, Node] = {}
    written = written_storages(gm.graph)
    for (projection, decision), rows in zip(decided, min_rows or [0] * len(decided), strict=True):
        if decision.settings is None:
            continue
        settings = decision.settings
        factor = _factor_input(gm, projection, settings, factors)
        offsets = _offsets(projection) if factor is not None else None
        key = (projection.x, factor, replace(settings, part=None), rows, offsets)
        if key not in selections or storage_of(fake(projection.x)) in written:
            selections[key] = _select(gm, projection, settings, factor, rows, offsets)
        if settings.part == "gate":
            projection = _split_gate(gm, projection)
        projection.node.replace_input_with(projection.x, selections[key])
        done.sites.append((projection, selections[key]))
    done.factors = list(factors)
    gm.recompile()
    return done


def factor_key(projection: Projection, settings: Settings) -> Key:
    """Return what identifies the factor of a projection among those of its weight."""
    rows = projection.gate_rows if settings.part == "gate" else None
    return settings.score, projection.transposed, rows


def _factor_input(
    gm: GraphModule, projection: Projection, settings: Settings, known: dict[FactorInput, Node]
) -> Node | None:
    """Return the placeholder of the projection's factor; ``magnitude`` needs none."""
    if settings.score == "magnitude":
        return None
    request = FactorInput(projection.weight, factor_key(projection, settings))
    if request not in known:
        weight = fake(projection.weight)
        size = (*projection.shape[:-2], projection.channels)
        with fake_mode_of(weight):
            value = torch.empty(size, dtype=torch.float32, device=weight.device)
        known[request] = add_input(gm.graph, f"amber_{settings.score}_{len(known)}", value)
    return known[request]


def _select(
    gm: GraphModule,
    projection: Projection,
    settings: Settings,
    factor: Node | None,
    rows: int,
    offsets: Node | None,
) -> Node:
    """Insert the selection before ``projection``, in the shape that shows its sequence."""
    graph, site, x = gm.graph, projection.node, projection.x
    origin = reshapes_of(x)[0] if settings.dense_prefix else x
    selected = insert_call(
        graph,
        site,
        torch.ops.amber.nm_select.default,
        x if origin is x else insert_call(graph, site, "view_as", x, origin),
        factor,
        settings.pattern.n,
        settings.pattern.m,
        settings.correction,
        settings.dense_prefix,
        rows,
        offsets,
    )
    return selected if origin is x else insert_call(graph, site, "view_as", selected, x)


def _split_gate(gm: GraphModule, projection: Projection) -> Projection:
    """Replace a fused gate and up projection by two on views of its weight; return the gate."""
    node, rows = projection.node, projection.gate_rows
    halves = halves_of(node)
    assert halves is not None, "decide() lets only visible halves pass"
    parts = [_part(gm, projection, slice(0, rows)), _part(gm, projection, slice(rows, None))]
    for half, part in zip(halves, parts, strict=True):
        part.meta["example_value"] = fake(half).contiguous()  # under autocast: of its dtype
        half.replace_all_uses_with(part)
        gm.graph.erase_node(half)
    for chunk in [*node.users, node]:
        gm.graph.erase_node(chunk)
    return replace(projection, node=parts[0])


def _part(gm: GraphModule, projection: Projection, rows: slice) -> Node:
    """Insert the projection onto some of the output rows of its weight and bias."""
    node, is_expert = projection.node, len(projection.shape) == 3
    index = (..., rows) if is_expert else rows

    def cut(name: str, value: Any) -> Any:
        if name not in ("weight", "bias") or not isinstance(value, Node):
            return value
        return insert_call(gm.graph, node, operator.getitem, value, index)

    names = ("input", "weight", "offs" if is_expert else "bias")
    args = [cut(name, value) for name, value in zip(names, node.args, strict=False)]
    kwargs = {name: cut(name, value) for name, value in node.kwargs.items()}
    return insert_call(gm.graph, node, node.target, *args, **kwargs)


def _offsets(projection: Projection) -> Node | None:
    """Return where the rows of each expert end, for projections of grouped rows."""
    offsets = projection.node.kwargs.get("offs") if len(projection.shape) == 3 else None
    return offsets if isinstance(offsets, Node) else None
