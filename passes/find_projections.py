"""Find the projections of a graph: every matmul that multiplies activations by a parameter.

    y = linear(x, w, b)          ->  Projection("model.layers.0.mlp.up_proj", x, w, ...)
    y = addmm(b, x, w)           ->  Projection("transformer.h.0.attn.c_attn", x, w, ...)
    y = grouped_mm(x, w, offs)   ->  Projection("model.layers.0.mlp.experts.down_proj", x, w, ...)

Nothing is skipped: a spelling that cannot be sparsified is a projection with its reason, so that
a report accounts for every linear of a model. Matmuls of two activations (attention) or of two
parameters are none. A projection inside a child graph is named by the call of that graph and by the
parameter passed in, so that layers which share a compiled region are told apart.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from amber_compile.naming import site_name
from amber_compile.passes.fused_gate import gate_rows
from amber_compile.passes.own_products import is_own as is_own
from amber_compile.passes.own_products import is_product, joined
from amber_compile.passes.weight_operand import WeightOperand, operation, weight_operands
from amber_compile.passes.written_weights import refuse_written
from amber_compile.projection import Projection, fake

aten = torch.ops.aten
Weights = Mapping[Node, WeightOperand]


class Spelling(NamedTuple):
    """Where a matmul takes its activation and its weight, and whether that is laid out [K, N]."""

    x: int
    weight: int
    kn: bool


LINEAR, MATMUL, ADDMM = Spelling(0, 1, kn=False), Spelling(0, 1, kn=True), Spelling(1, 2, kn=True)
WEIGHT_FIRST = Spelling(1, 0, kn=False)
SPELLINGS: dict[Any, Spelling] = {
    **dict.fromkeys((torch._C._nn.linear, torch.nn.functional.linear, aten.linear.default), LINEAR),
    **dict.fromkeys((torch.mm, aten.mm.default, "mm"), MATMUL),
    **dict.fromkeys((torch.bmm, aten.bmm.default, "bmm"), MATMUL),
    **dict.fromkeys((torch.matmul, aten.matmul.default, "matmul"), MATMUL),
    **dict.fromkeys((operator.matmul, "__matmul__"), MATMUL),
    **dict.fromkeys((torch.addmm, aten.addmm.default, "addmm"), ADDMM),
    **dict.fromkeys((torch.baddbmm, aten.baddbmm.default, "baddbmm"), ADDMM),
}
LINEARS = frozenset(target for target, spelling in SPELLINGS.items() if spelling is LINEAR)
SPLIT = LINEARS | {aten.mm.default, aten.addmm.default}
"""Matrix products that may be split into two by the rows of their weight; grouped ones may too."""
KEYWORDS = {0: ("input", "self"), 1: ("weight", "mat2", "other", "mat1", "batch1")}
KEYWORDS_OF_THREE = {1: ("mat1", "batch1"), 2: ("mat2", "batch2")}
GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
OPAQUE = {
    *("einsum", "tensordot", "inner", "bilinear", "multi_dot", "linalg_multi_dot"),
    *("multi_head_attention_forward", "_transformer_encoder_layer_fwd"),
}
"""Operations that multiply by parameters without showing what is contracted with what."""


def find_projections(gm: GraphModule) -> list[Projection]:
    """Return the projections of ``gm`` in execution order, child graphs included."""
    return refuse_written(gm, joined(list(_walk(gm, weight_operands(gm.graph)))))


def _walk(gm: GraphModule, weights: Weights) -> Iterator[Projection]:
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            yield from _match(node, weights)
        for child in _child_graphs(gm, node):
            passed = _passed(node, child, weights)
            for projection in _walk(child, weight_operands(child.graph, passed)):
                yield replace(
                    projection,
                    name=site_name(node, projection.weight),
                    unsupported="it lies inside a nested graph (a checkpoint, a condition or a "
                    "compiled region)",
                )


def _match(node: Node, weights: Weights) -> Iterator[Projection]:
    if is_product(node):
        yield from _own(node, weights)
        return
    if operation(node) in OPAQUE:
        yield from _opaque(node, weights)
        return
    for spelling in _spellings(node):
        x, weight = _argument(node, spelling.x), _argument(node, spelling.weight)
        if isinstance(x, Node) and x not in weights and _is_matrix(weight, weights):
            yield _projection(node, x, weights[weight], spelling)
            return


def _spellings(node: Node) -> Iterator[Spelling]:
    """Yield the ways in which ``node`` may be a projection, the likeliest first."""
    if operation(node) in GROUPED:
        yield MATMUL
    elif node.target in SPELLINGS:
        yield SPELLINGS[node.target]
        if SPELLINGS[node.target] is MATMUL:
            yield WEIGHT_FIRST


def _projection(node: Node, x: Node, weight: WeightOperand, spelling: Spelling) -> Projection:
    shape = tuple(fake(weight.parameter).shape)
    transposed = spelling.kn != weight.transposed
    if transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    splittable = node.target in SPLIT or operation(node) in GROUPED
    return Projection(
        name=site_name(node, weight.parameter),
        node=node,
        x=x,
        weight=weight.parameter,
        shape=shape,
        transposed=transposed,
        operator=_spelling(node),
        gate_rows=gate_rows(node) if splittable else None,
        unsupported=_why_unsupported(node, weight, spelling),
    )


def _why_unsupported(node: Node, weight: WeightOperand, spelling: Spelling) -> str | None:
    """Return why this spelling cannot be sparsified, or None if it can."""
    dimensions = fake(weight.parameter).dim()
    if weight.derived:
        return f"its weight is computed from a parameter ({weight.derived})"
    if spelling is WEIGHT_FIRST:
        return "its weight is the left operand, so the channels of x are not its last dimension"
    if dimensions > 3:
        return f"its weight has {dimensions} dimensions"
    if weight.picked:
        return "its weight is taken out of a stack of matrices, in whatever order"
    if dimensions == 3 and offsets_of(node) is None:
        return "its weight is a stack of matrices, and only grouped_mm says which rows meet which"
    return None


def offsets_of(node: Node) -> Node | None:
    """Return where the rows of each matrix of a stack end, if ``node`` is a grouped product."""
    given = dict(zip(("input", "weight", "offs"), node.args, strict=False)) | node.kwargs
    offsets = given.get("offs") if operation(node) in GROUPED else None
    return offsets if isinstance(offsets, Node) else None


def _own(node: Node, weights: Weights) -> Iterator[Projection]:
    """Yield the projection that ``node`` was before it was rewritten."""
    x = node.all_input_nodes[0]
    matrices = [one for one in node.all_input_nodes[1:] if _is_matrix(one, weights)]
    if matrices:
        parameter = weights[matrices[0]].parameter
        yield Projection(
            name=site_name(node, parameter),
            node=node,
            x=x,
            weight=parameter,
            shape=(int(fake(node).shape[-1]), int(fake(x).shape[-1])),
            transposed=False,
            operator=_spelling(node),
        )


def _opaque(node: Node, weights: Weights) -> Iterator[Projection]:
    """Yield a projection for each matrix among the arguments, if there is an activation too."""
    activations = [one for one in node.all_input_nodes if one not in weights]
    for operand in node.all_input_nodes:
        if activations and _is_matrix(operand, weights):
            parameter = weights[operand].parameter
            yield Projection(
                name=site_name(node, parameter),
                node=node,
                x=activations[0],
                weight=parameter,
                shape=tuple(fake(parameter).shape),
                transposed=False,
                operator=_spelling(node),
                unsupported=f"{_spelling(node)} does not show which dimension is contracted",
            )


def _is_matrix(operand: Any, weights: Weights) -> bool:
    """Whether ``operand`` is made from a parameter of at least two dimensions."""
    if not isinstance(operand, Node) or operand not in weights:
        return False
    return fake(weights[operand].parameter).dim() >= 2


def _child_graphs(gm: GraphModule, node: Node) -> Iterator[GraphModule]:
    """Yield the graphs that ``node`` runs: bodies of checkpoints, conditions, compiled regions."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            child = getattr(gm, str(argument.target), None)
            if isinstance(child, GraphModule):
                yield child


def _passed(node: Node, child: GraphModule, weights: Weights) -> dict[Node, WeightOperand]:
    """Return which inputs of ``child`` are weights: its inputs are the last that ``node`` has."""
    inputs = child.graph.find_nodes(op="placeholder")
    arguments = tree_leaves(node.args)[-len(inputs) :] if inputs else []
    pairs = zip(inputs, arguments, strict=False)
    return {inside: weights[outside] for inside, outside in pairs if outside in weights}


def _argument(node: Node, position: int) -> Any:
    """Return a positional argument, or the keyword that torch gives it."""
    if position < len(node.args):
        return node.args[position]
    keywords = KEYWORDS_OF_THREE if SPELLINGS.get(node.target) is ADDMM else KEYWORDS
    return next((node.kwargs[key] for key in keywords[position] if key in node.kwargs), None)


def _spelling(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
