"""Correct what a sparse projection answers by what calibration found.

    y = linear(s, w)        ->   y = linear(s, w*)                              updated_weight
                                 y = (y * alpha + beta).to(y.dtype)             output_scale, _bias

``w*`` [N, K] is what approximates the dense product best when its input is a selection (ridge
regression, the idea of DuoGPT, arXiv 2506.20194); ``alpha`` and ``beta``, fp32 [N], belong to the
matmul's epilogue: a compiler fuses them into what follows, or into the product itself.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from amber_compile.derivations import Calibrated
from amber_compile.graph import append_call, erase_unread, insert_call
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.passes.find_projections import LINEARS, SPELLINGS
from amber_compile.plan_tensors import PlanTensors
from amber_compile.projection import Projection, fake
from amber_compile.settings import Settings

aten = torch.ops.aten
UPDATED = LINEARS | {aten.mm.default, aten.addmm.default}
"""Products whose weight may be another one in prefill."""


def correct_outputs(
    gm: GraphModule,
    projection: Projection,
    settings: Settings,
    inputs: DerivedInputs,
    tensors: PlanTensors | None = None,
    *,
    weight: bool = True,
    epilogue: bool = True,
) -> int:
    """Correct one projection as ``settings`` ask; return how many corrections that were.

    Without ``weight`` or ``epilogue`` a later pass does that part: quantised products have scales
    and weights of their own.
    """
    node, done = projection.node, 0
    rows = fake(node).shape[-1]

    def calibrated(name: str, *shape: int) -> Node:
        dtype = fake(weight_of(node)).dtype if name == "weight" else None
        request = Calibrated(projection.name, name, tensors or PlanTensors(), shape)
        request = replace(request, dtype=dtype) if dtype else request
        return inputs.node(projection.weight, request, name)

    if settings.updated_weight and weight:
        before, updated = weight_of(node), calibrated("weight", rows, projection.channels)
        if node.target not in LINEARS:
            updated = insert_call(gm.graph, node, aten.permute.default, updated, [1, 0])
        node.replace_input_with(before, updated)
        erase_unread(gm.graph, before)
        done += 1
    end = node
    if settings.output_scale and epilogue:
        end = append_call(gm.graph, end, operator.mul, end, calibrated("output_scale", rows))
    if settings.output_bias and epilogue:
        end = append_call(gm.graph, end, operator.add, end, calibrated("output_bias", rows))
    if end is not node:
        end = append_call(gm.graph, end, "to", end, fake(node).dtype)
        _read_instead(node, end)
        done += settings.output_scale + settings.output_bias
    return done


def why_not_corrected(projection: Projection, settings: Settings) -> str | None:
    """Return what prevents the corrections that ``settings`` ask for, or None."""
    if settings.updated_weight and projection.node.target not in UPDATED:
        return f"updated_weight of a {projection.operator}; valid: linear"
    if len(projection.shape) == 3 and (settings.output_scale or settings.output_bias):
        return "output_scale and output_bias of grouped experts"
    return None


def weight_of(node: Node) -> Node:
    """Return the weight operand of a ``linear`` node, or of one that updates may follow."""
    at = SPELLINGS[node.target].weight
    weight = node.args[at] if len(node.args) > at else node.kwargs["weight"]
    assert isinstance(weight, Node)
    return weight


def _read_instead(node: Node, end: Node) -> None:
    """Let every reader of ``node`` read ``end``, but for the nodes between the two."""
    between = set()
    step = end
    while step is not node:
        between.add(step)
        step = step.all_input_nodes[0]
    node.replace_all_uses_with(end, delete_user_cb=lambda user: user not in between)
