"""Sparsify what enters a projection.

    y = linear(x, w)             ->  s = nm_select(x, factor, n, m);   y = linear(s, w)
    q = linear(x, wq)            ->  s = nm_select(x, None, n, m)      one selection for both,
    k = linear(x, wk)                q = linear(s, wq); k = linear(s, wk)    if it is the same
    gate, up = linear(x, w).chunk(2, -1)      under ``part="gate"``
                                 ->  gate = linear(s, w[:I]);   up = linear(x, w[I:])
    x = h.view(-1, K); y = linear(x, w)       under ``dense_prefix``, h [B, S, K]
                                 ->  s = nm_select(x.view_as(h), ...).view_as(x);  y = linear(s, w)

    y = linear(x, w)    under ``updated_weight``, ``output_scale`` and ``output_bias``
                                 ->  y = (linear(s, w*) * alpha + beta).to(y.dtype)

``factor`` (one number per channel) becomes a further graph input, as do the plan's ``w*``,
``alpha`` and ``beta``: the caller has them once per weight and passes them on each call. Left
alone: projections whose decision is dense. A selection is not shared if anything writes to ``x`` in
place, directly or through a view.
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
from amber_compile.derivations import Calibrated, Derivation, Matrix, ScoreFactor
from amber_compile.graph import erase_unread, insert_call, storage_of, written_storages
from amber_compile.passes.classify_phase import reshapes_of
from amber_compile.passes.correct_outputs import correct_outputs
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.passes.find_projections import LINEARS, offsets_of
from amber_compile.passes.fused_gate import halves_of, reshaped
from amber_compile.passes.quantize_projections import takes_epilogue
from amber_compile.passes.sharded_operands import gate_rows_of_whole, insert_selection
from amber_compile.plan_tensors import PlanTensors
from amber_compile.projection import Projection, fake
from amber_compile.settings import CALIBRATED, Settings

aten = torch.ops.aten
Decided = Sequence[tuple[Projection, Decision]]


@dataclass
class Sparsified:
    """What the pass did.

    Attributes:
        inputs: those it appended, among others.
        sites: each site with the selection it reads.
        halves: of each fused projection that was split: the gate, and the up half.
    """

    inputs: DerivedInputs
    sites: list[tuple[Projection, Node]] = field(default_factory=list)
    halves: dict[Node, tuple[Node, Node]] = field(default_factory=dict)


def sparsify_projections(
    gm: GraphModule,
    decided: Decided,
    min_rows: Sequence[int] | None = None,
    inputs: DerivedInputs | None = None,
    tensors: PlanTensors | None = None,
) -> Sparsified:
    """Put an N:M selection in front of each projection decided sparse.

    Args:
        gm: the graph to change.
        decided: its projections, each with what becomes of it.
        min_rows: how many rows the input of each must have to be selected from; it is compared
            inside the operator, at run time, so that a symbolic count stays free of guards.
        inputs: where the further inputs of the graph are kept.
        tensors: of the plan.
    """
    done = Sparsified(inputs or DerivedInputs(gm))
    selections: dict[object, Node] = {}
    written = written_storages(gm.graph)
    for (projection, decision), rows in zip(decided, min_rows or [0] * len(decided), strict=True):
        if decision.settings is None:
            continue
        settings = decision.settings
        factor = _factor_input(projection, settings, done.inputs, tensors)
        offsets = offsets_of(projection.node) if factor is not None else None
        how = settings.pattern, settings.correction, settings.dense_prefix
        key = (projection.x, factor, how, rows, offsets)
        if key not in selections or storage_of(fake(projection.x)) in written:
            selections[key] = _select(gm, projection, settings, factor, rows, offsets)
        if settings.part == "gate":
            halves = _split_gate(gm, projection)
            done.halves[projection.node] = halves
            projection = replace(projection, node=halves[0])
        projection.node.replace_input_with(projection.x, selections[key])
        correct_outputs(
            *(gm, projection, settings, done.inputs, tensors),
            weight=decision.quantization is None,
            epilogue=not takes_epilogue(decision, projection.node),
        )
        done.sites.append((projection, selections[key]))
    gm.recompile()
    return done


def factor_of(
    projection: Projection, settings: Settings, tensors: PlanTensors | None
) -> Derivation | None:
    """Return what a site's factor follows from; ``magnitude`` has none."""
    if settings.score == "magnitude":
        return None
    if settings.score == CALIBRATED:
        shape = (*projection.shape[:-2], projection.channels)
        return Calibrated(projection.name, "factor", tensors or PlanTensors(), shape)
    rows = gate_rows_of_whole(projection) if settings.part == "gate" else None
    return ScoreFactor(settings.score, Matrix(projection.transposed, 0, rows))


def _factor_input(
    projection: Projection, settings: Settings, inputs: DerivedInputs, tensors: PlanTensors | None
) -> Node | None:
    """Return the placeholder of the projection's factor."""
    request = factor_of(projection, settings, tensors)
    return inputs.node(projection.weight, request, settings.score) if request else None


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
    shown = x if origin is x else insert_call(graph, site, "view_as", x, origin)
    selected = insert_selection(graph, projection, shown, factor, settings, rows, offsets)
    return selected if origin is x else insert_call(graph, site, "view_as", selected, x)


def _split_gate(gm: GraphModule, projection: Projection) -> tuple[Node, Node]:
    """Replace a fused gate and up projection by two on views of its weight; return both."""
    node, rows = projection.node, projection.gate_rows
    halves = halves_of(node)
    assert halves is not None, "decide() lets only visible halves pass"
    parts = [_part(gm, projection, slice(0, rows)), _part(gm, projection, slice(rows, None))]
    whole = reshaped(node)
    for half, part in zip(halves, parts, strict=True):
        if whole is node:
            part.meta["example_value"] = fake(half).contiguous()  # under autocast: of its dtype
            shaped = part
        else:
            sizes: Any = whole.args[1]
            shaped = insert_call(
                gm.graph, whole, whole.target, part, [*sizes[:-1], fake(half).shape[-1]]
            )
        half.replace_all_uses_with(shaped)
        erase_unread(gm.graph, half)
    return parts[0], parts[1]


def _part(gm: GraphModule, projection: Projection, rows: slice) -> Node:
    """Insert the projection onto some of the output rows of its weight and bias."""
    node, is_expert = projection.node, len(projection.shape) == 3
    names = ("input", "weight", "offs" if is_expert else "bias")
    if node.target is aten.addmm.default:
        names = ("bias", "input", "weight")
    in_columns = is_expert or node.target not in LINEARS

    def cut(name: str, value: Any) -> Any:
        if name not in ("weight", "bias") or not isinstance(value, Node):
            return value
        index = (..., rows) if in_columns and name == "weight" else rows
        return insert_call(gm.graph, node, operator.getitem, value, index)

    args = [cut(name, value) for name, value in zip(names, node.args, strict=False)]
    kwargs = {name: cut(name, value) for name, value in node.kwargs.items()}
    return insert_call(gm.graph, node, node.target, *args, **kwargs)
