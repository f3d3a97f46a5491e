"""Copy a Dynamo graph and give it further inputs, keeping what AOTAutograd reads of it.

Dynamo reads its own graph again after the backend returns, so a rewrite works on a copy. Besides
nodes and their ``meta``, AOTAutograd wants ``_dynamo_source`` on every placeholder (None for an
input that Dynamo does not know), ``_param_name_to_source`` and ``meta`` of the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from .projection import fake_mode_of, value_of

STATIC = {"_dynamo_static_input_type": "unguarded"}
"""Tells CUDA graphs that an input keeps its address."""


def copy_graph(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """Return a copy of ``gm`` with its own graph, and the copy of every node."""
    graph = Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    nodes: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, nodes)
    end = graph.output(output)
    end.meta = dict(gm.graph.output_node().meta)
    for old in gm.graph.find_nodes(op="placeholder"):
        nodes[old].meta.pop("grapharg", None)  # holds the real input: the copy must not
        if hasattr(old, "_dynamo_source"):
            nodes[old]._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]  # Dynamo's
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy, nodes


def add_input(graph: Graph, name: str, value: torch.Tensor) -> Node:
    """Append a placeholder for the fake tensor ``value`` after the last one and return it."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta = {"example_value": value, "tensor_dict": dict(STATIC)}
    node._dynamo_source = None  # type: ignore[attr-defined]  # an input Dynamo does not know
    return node


def insert_call(graph: Graph, site: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a call before ``site``, as part of its module, and record its fake value."""
    with graph.inserting_before(site):
        node = graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in site.meta:
            node.meta[key] = site.meta[key]
    fakes = map_arg((args, kwargs), value_of)
    with fake_mode_of(*tree_leaves(fakes)), torch.no_grad():
        node.meta["example_value"] = target(*fakes[0], **fakes[1])
    return node


def positions(gm: GraphModule) -> dict[Node, int]:
    """Return the position of every placeholder among the arguments."""
    return {node: at for at, node in enumerate(gm.graph.find_nodes(op="placeholder"))}


def is_inplace(node: Node) -> bool:
    """Whether ``node`` writes to its first argument."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    return writes or name in ("setitem", "iadd", "imul", "isub", "itruediv")
