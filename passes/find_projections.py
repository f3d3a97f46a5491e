"""Find the projections of a graph: every matmul that multiplies activations by a parameter.

    y = linear(x, w, b)          ->  Projection("model.layers.0.mlp.up_proj", x, w, ...)
    y = addmm(b, x, w)           ->  Projection("transformer.h.0.attn.c_attn", x, w, ...)
    y = grouped_mm(x, w, offs)   ->  Projection("model.layers.0.mlp.experts.down_proj", x, w, ...)

Nothing is skipped: a spelling that cannot be sparsified is a projection with its reason, so that
a report accounts for every linear of a model. Matmuls of two activations (attention) are none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from amber_compile.naming import site_name
from amber_compile.projection import Projection, fake

from .fused_gate import gate_rows
from .weight_operand import WeightOperand, trace_weight

aten = torch.ops.aten
Reader = Callable[[Node], tuple[Any, Any, bool]]
"""From a node: the activation, the weight, and whether that is laid out ``[K, N]``."""


def _at(first: int, *, kn: bool) -> Reader:
    """Read activation and weight from arguments ``first`` and ``first + 1``."""
    return lambda node: (_argument(node, first), _argument(node, first + 1), kn)


def _weight_first(first: int) -> Reader:
    """Read ``bmm(weight, x)``: a weight gathered for each token, times column vectors."""
    return lambda node: (_argument(node, first + 1), _argument(node, first), False)


SPELLINGS: dict[Any, Reader] = {
    torch._C._nn.linear: _at(0, kn=False),
    torch.nn.functional.linear: _at(0, kn=False),
    aten.linear.default: _at(0, kn=False),
    torch.addmm: _at(1, kn=True),
    aten.addmm.default: _at(1, kn=True),
    torch.baddbmm: _at(1, kn=True),
    **{target: _at(0, kn=True) for target in (torch.mm, torch.bmm, torch.matmul)},
    **{target: _at(0, kn=True) for target in (operator.matmul, torch._grouped_mm)},
    **{target.default: _at(0, kn=True) for target in (aten.mm, aten.bmm, aten.matmul)},
}
SPLITTABLE = {torch._C._nn.linear, torch.nn.functional.linear, aten.linear.default}
METHODS = {"matmul": 0, "mm": 0, "bmm": 0, "__matmul__": 0, "addmm": 1, "baddbmm": 1}
GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
EINSUM = {torch.einsum, torch.functional.einsum, torch.tensordot, torch.nn.functional.bilinear}


def find_projections(gm: GraphModule) -> list[Projection]:
    """Return the projections of ``gm`` in execution order, child graphs included."""
    return list(_walk(gm, nested=False))


def _walk(gm: GraphModule, nested: bool) -> Iterator[Projection]:
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            yield from _match(node, nested)
        for child in _child_graphs(gm, node):
            yield from _walk(child, nested=True)


def _match(node: Node, nested: bool) -> Iterator[Projection]:
    if node.target in EINSUM:
        yield from _einsum(node)
        return
    for reader in _readers(node):
        x, operand, kn = reader(node)
        weight = trace_weight(operand) if isinstance(operand, Node) else None
        if weight is None or not isinstance(x, Node) or trace_weight(x) is not None:
            continue
        yield _projection(node, x, weight, kn, nested)
        return


def _readers(node: Node) -> Iterator[Reader]:
    """Yield the ways in which ``node`` may be a projection, the likeliest first."""
    if node.op == "call_method":
        if node.target in METHODS:
            yield _at(METHODS[str(node.target)], kn=True)
    elif node.target in SPELLINGS:
        yield SPELLINGS[node.target]
    elif _is_grouped(node.target):
        yield _at(0, kn=True)
    if node.target in (torch.bmm, aten.bmm.default, torch.matmul, operator.matmul, "bmm"):
        yield _weight_first(0)


def _projection(node: Node, x: Node, weight: WeightOperand, kn: bool, nested: bool) -> Projection:
    shape = tuple(fake(weight.parameter).shape)
    transposed = kn != weight.transposed
    if transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return Projection(
        name=site_name(node, weight.parameter),
        node=node,
        x=x,
        weight=weight.parameter,
        shape=shape,
        transposed=transposed,
        operator=_spelling(node),
        gate_rows=gate_rows(node)
        if node.target in SPLITTABLE or _is_grouped(node.target)
        else None,
        unsupported=_why_unsupported(node, x, weight, nested),
    )


def _why_unsupported(node: Node, x: Node, weight: WeightOperand, nested: bool) -> str | None:
    """Return why this spelling cannot be sparsified, or None if it can."""
    if nested:
        return "it lies inside a nested graph (a checkpoint, a condition or a compiled region)"
    if weight.derived:
        return f"its weight is computed from a parameter ({weight.derived})"
    if fake(weight.parameter).dim() not in (2, 3):
        return f"its weight has {fake(weight.parameter).dim()} dimensions"
    if _weight_is_left(node, x):
        return "the weight is the left operand of the matmul (one weight gathered per token)"
    return None


def _weight_is_left(node: Node, x: Node) -> bool:
    """Whether an argument before ``x`` is a stack of weights: ``bmm(w[experts], x)``."""
    before = list(node.args[: node.args.index(x)]) if x in node.args else []
    return any(isinstance(one, Node) and fake(one).dim() == 3 for one in before)


def _einsum(node: Node) -> Iterator[Projection]:
    operands = [arg for arg in node.all_input_nodes if isinstance(arg, Node)]
    for operand in operands:
        weight = trace_weight(operand)
        others = [other for other in operands if other is not operand]
        if weight is not None and others and fake(weight.parameter).dim() >= 2:
            yield Projection(
                name=site_name(node, weight.parameter),
                node=node,
                x=others[0],
                weight=weight.parameter,
                shape=tuple(fake(weight.parameter).shape),
                transposed=False,
                operator=_spelling(node),
                unsupported=f"{_spelling(node)} does not say which dimension is contracted",
            )


def _child_graphs(gm: GraphModule, node: Node) -> Iterator[GraphModule]:
    """Yield the graphs that ``node`` runs: bodies of checkpoints, conditions, compiled regions."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            child = getattr(gm, str(argument.target), None)
            if isinstance(child, GraphModule):
                yield child


def _argument(node: Node, position: int) -> Any:
    """Return a positional argument, or the keyword that torch gives it."""
    if position < len(node.args):
        return node.args[position]
    keywords = {0: ("input", "self"), 1: ("weight", "mat2", "other", "mat1"), 2: ("mat2",)}
    return next((node.kwargs[key] for key in keywords[position] if key in node.kwargs), None)


def _is_grouped(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).split(".")[-1] in GROUPED
    return getattr(target, "__name__", "") in GROUPED


def _spelling(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
