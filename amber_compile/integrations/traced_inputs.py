"""Recognise and name the weights of a graph behind AOTAutograd.

    L['self']._modules['q_proj']._parameters['weight']    ->    arg0_1    a weight, "q_proj.weight"
    L['x']                                                ->    arg1_1    none

Behind AOTAutograd an input has neither name nor value, but the order of the inputs is that of the
graph that Dynamo has traced and still holds. A graph with other inputs is a piece of Dynamo's, or
Dynamo was not asked: there an input is a weight without a name if AOTAutograd was told that it
keeps its storage from call to call, or, where nobody was told, if nothing but products read it, on
the side of their weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node

from amber_compile.graph import positions
from amber_compile.naming import PARAMETER, module_path, parameter_path
from amber_compile.passes.find_projections import SPELLINGS
from amber_compile.passes.weight_operand import QUANTISED, TRANSPOSES, is_parameter, operation
from amber_compile.projection import value_of


def mark_weights(gm: GraphModule) -> int:
    """Mark the inputs of ``gm`` that are weights, by name where it is known; return how many."""
    inputs = list(positions(gm))
    traced = _traced_inputs(inputs)
    static = None if traced else _static_inputs(len(inputs))
    for at, node in enumerate(inputs):
        if PARAMETER in node.meta:
            continue  # somebody knows better
        if traced:
            if is_parameter(traced[at]):
                node.meta[PARAMETER] = parameter_path(traced[at])
        elif _may_be_weight(node) and (_only_multiplies(node) if static is None else at in static):
            node.meta[PARAMETER] = ""
    return sum(PARAMETER in node.meta for node in inputs)


def traced_names() -> list[str]:
    """Return all that a decision may know a projection by: names of inputs, then of calls.

    In the order of Dynamo's graph, "" for what is no weight: two models whose graphs are equal and
    whose modules have other names, or the same names in other places, differ here.
    """
    graph = _dynamo_graph()
    if graph is None:
        return []
    inputs = graph.find_nodes(op="placeholder")
    calls = [module_path(node) for node in graph.nodes if node.op.startswith("call_")]
    named = [parameter_path(node) if is_parameter(node) else "" for node in inputs]
    return named + [name for name, _ in itertools.groupby(calls)]


def _dynamo_graph() -> Graph | None:
    """Return the graph that Dynamo compiles now, if it does."""
    from torch._dynamo.symbolic_convert import tls  # here: importing it takes a second

    tracer = getattr(tls, "current_tx", None)
    return tracer.output.graph if tracer is not None else None


def _traced_inputs(inputs: Sequence[Node]) -> list[Node]:
    """Return Dynamo's inputs, one for each of ``inputs``; none if these are others."""
    graph = _dynamo_graph()
    traced = graph.find_nodes(op="placeholder") if graph is not None else []
    same = len(traced) == len(inputs) and all(map(_alike, traced, inputs))
    return list(traced) if same else []


def _alike(traced: Node, node: Node) -> bool:
    """Whether two nodes record tensors of one shape and type, or no tensors."""
    one, other = value_of(traced), value_of(node)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)
    kind = (one.dtype, one.device, one.dim()) == (other.dtype, other.device, other.dim())
    return kind and all(map(_agree, one.shape, other.shape))


def _agree(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes may be the same; a symbolic one is not asked for its value."""
    return one == other if isinstance(one, int) and isinstance(other, int) else True


def _static_inputs(count: int) -> set[int] | None:
    """Return which of ``count`` inputs keep their storage, as far as AOTAutograd has these."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    if metadata is None or len(metadata.input_info) != count:
        return None  # of a frozen graph, whose weights are constants, positions are others
    return set(metadata.static_input_indices)


def _may_be_weight(node: Node) -> bool:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return False
    if not all(isinstance(size, int) for size in value.shape):
        return False
    return value.is_floating_point() or (value.dtype in QUANTISED and value.dim() >= 2)


def _only_multiplies(node: Node) -> bool:
    users = [
        (user, read)
        for read in (node, *(one for one in node.users if operation(one) in TRANSPOSES))
        for user in read.users
        if operation(user) not in TRANSPOSES
    ]
    right = [
        user.target in SPELLINGS and user.args[SPELLINGS[user.target].weight] is read
        for user, read in users
    ]
    return bool(right) and all(right)
