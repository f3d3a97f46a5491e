"""Copy a Dynamo graph and give it further inputs, keeping what AOTAutograd reads of it.

Dynamo reads its own graph again after the backend returns, so a rewrite works on a copy. Besides
nodes and their ``meta``, AOTAutograd wants ``_dynamo_source`` on every placeholder (None for an
input that Dynamo does not know), ``_param_name_to_source`` and ``meta`` of the module.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from .projection import fake_mode_of, value_of

STATIC = {"_dynamo_static_input_type": "unguarded"}
"""Tells CUDA graphs that an input keeps its address."""

ASKS_SIZES = torch.torch_version.TorchVersion(torch.__version__) < "2.13"

WRITERS = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}
WRITERS |= {"iand", "ior", "ixor", "ilshift", "irshift"}
"""The Python operators that write to their first operand."""


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
            nodes[old]._dynamo_source = old._dynamo_source
    with _use_lazy_graph_module(True):  # generates no code before it is called
        copy = _make_graph_module(gm, graph)
    copy.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy, nodes


def add_input(graph: Graph, name: str, value: torch.Tensor) -> Node:
    """Append a placeholder for the fake tensor ``value`` after the last one and return it."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.target = node.name  # the argument's name: unique, where ``name`` may be taken
    node.meta = {"example_value": value, "tensor_dict": dict(STATIC)}
    node._dynamo_source = None  # an input that Dynamo does not know
    return node


def insert_call(graph: Graph, site: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a call before ``site``, as part of its module, and record its fake value.

    ``target`` is a function, or the name of a method of the first argument.
    """
    with graph.inserting_before(site):
        return _call_node(graph, site, target, args, kwargs)


def append_call(graph: Graph, site: Node, target: Any, *args: Any) -> Node:
    """Insert a call right behind ``site``, as :func:`insert_call` does before it."""
    with graph.inserting_after(site):
        return _call_node(graph, site, target, args, {})


def _call_node(graph: Graph, site: Node, target: Any, args: Any, kwargs: Any) -> Node:
    kind = "call_method" if isinstance(target, str) else "call_function"
    node = graph.create_node(kind, target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in site.meta:
            node.meta[key] = site.meta[key]
    fakes = map_arg((args, kwargs), value_of)
    with fake_mode_of(*tree_leaves(fakes)), torch.no_grad():
        node.meta["example_value"] = call(target, *fakes)
    return node


def erase_unread(graph: Graph, node: Node) -> None:
    """Erase ``node`` if nothing reads it, and then what only it has read; inputs stay."""
    if node.users or node.op in ("placeholder", "get_attr"):
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        erase_unread(graph, source)


def positions(gm: GraphModule) -> dict[Node, int]:
    """Return the position of every placeholder among the arguments."""
    return {node: at for at, node in enumerate(gm.graph.find_nodes(op="placeholder"))}


def call(target: Any, args: Any, kwargs: Any) -> Any:
    """Run what a node's target names: a function, or a method of the first argument.

    Before PyTorch 2.13 as Dynamo does it, through the Python dispatcher: there the C++ body of
    ``linear`` would ask a symbolic size for its value. It takes a millisecond a call.
    """
    with enable_python_dispatcher() if ASKS_SIZES else contextlib.nullcontext():
        if isinstance(target, str):
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def written_storages(graph: Graph) -> set[StorageWeakRef]:
    """Return the storages that some node of ``graph`` writes to: views share one."""
    values = [value_of(operand) for node in graph.nodes for operand in written(node)]
    return {storage_of(value) for value in values if isinstance(value, torch.Tensor)}


def storage_of(value: torch.Tensor) -> StorageWeakRef:
    """Return what two tensors have in common if one is a view of the other."""
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]  # torch's


def written(node: Node) -> list[Node]:
    """Return the operands that ``node`` writes to: ``x.add_(y)``, ``x[0] = y``, ``out=x`` ...

    A higher-order operator may write to anything that it reads.
    """
    target: Any = node.target
    operands: list[Any]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target._overload_names]
        operands = [_written_by_schema(node, overload) for overload in overloads]
    elif isinstance(target, torch._ops.OpOverload):
        operands = _written_by_schema(node, target)
    else:
        operands = [node.kwargs.get("out"), *(node.args[:1] if _is_inplace(node) else ())]
    return [one for one in dict.fromkeys(tree_leaves(operands)) if isinstance(one, Node)]


def _written_by_schema(node: Node, overload: torch._ops.OpOverload) -> list[Any]:
    arguments = overload._schema.arguments
    given = dict(zip((one.name for one in arguments), node.args, strict=False)) | node.kwargs
    changed = [one.name for one in arguments if one.alias_info and one.alias_info.is_write]
    return [given.get(name) for name in changed]


def _is_inplace(node: Node) -> bool:
    """Whether a function or method writes to its first argument, by its name or ``inplace=``."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.strip("_") in WRITERS:
        return True
    if getattr(target, "__module__", None) == "_operator":  # and_, not_, is_ write to nothing
        return False
    at = _inplace_argument(target)
    asked = node.kwargs.get("inplace") or (at is not None and node.args[at : at + 1] == (True,))
    return bool(asked) or re.fullmatch(r".*[^_]_", name) is not None


@functools.cache
def _inplace_argument(target: Any) -> int | None:
    """Return the position at which a function takes ``inplace``, if it does."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a method's name, or a builtin
        return None
    return names.index("inplace") if "inplace" in names else None
