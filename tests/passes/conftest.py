"""Graphs as Dynamo traces them, and how two are compared: node for node, but for names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from amber_compile.derived import derive
from amber_compile.graph import copy_graph
from amber_compile.passes import Sparsified, verify
from amber_compile.projection import value_of

Capture = Callable[..., tuple[GraphModule, list[Any]]]
Pass = Callable[[GraphModule], Sparsified]


@pytest.fixture
def capture() -> Capture:
    """Return ``capture(function, *inputs)``: the one graph of a call, and its inputs."""
    return capture_graph


@pytest.fixture
def assert_rewrites() -> Callable[..., Sparsified]:
    """Return ``assert_rewrites(pass, before, after, *inputs, sites=...)``."""
    return check_rewrite


def capture_graph(
    function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None
) -> tuple[GraphModule, list[Any]]:
    """Return the graph that Dynamo hands to a backend, and the inputs that it brings."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def probe(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((gm, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=probe, dynamic=dynamic)(*inputs)
    (only,) = found
    return only


def check_rewrite(
    rewrite: Pass,
    before: Callable[..., Any],
    after: Callable[..., Any],
    *inputs: torch.Tensor,
    sites: int,
    dynamic: bool | None = None,
) -> Sparsified:
    """Assert that ``rewrite`` turns the graph of ``before`` into that of ``after``.

    ``after`` takes the factors that were appended, after ``inputs``.
    """
    gm, found = capture_graph(before, *inputs, dynamic=dynamic)
    copy, _ = copy_graph(gm)
    untouched = program(gm, found, inputs)
    done = rewrite(copy)
    places = list(gm.graph.find_nodes(op="placeholder"))
    names = [place.name for place in places]
    requests = done.inputs.requests
    factors = [derive(found[names.index(one.weight.name)], one.request) for one in requests]
    wanted, given = capture_graph(after, *inputs, *factors, dynamic=dynamic)
    ordered = [*inputs, *factors]
    assert program(copy, [*found, *factors], ordered) == program(wanted, given, ordered)
    assert program(gm, found, inputs) == untouched, "the pass changed Dynamo's own graph"
    assert len(done.sites) == sites
    verify(copy)
    return done


def program(gm: GraphModule, values: Iterable[Any], ordered: Sequence[torch.Tensor]) -> list[str]:
    """Return the nodes of ``gm`` as text, a line each; its inputs are numbered as ``ordered``."""
    numbers = {id(value): at for at, value in enumerate(ordered)}
    labels: dict[Node, str] = {}
    lines = []
    values = iter(values)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = next(values)
            labels[node] = f"x{numbers[id(value)]}" if id(value) in numbers else f"size {value}"
        elif node.op != "get_attr":
            labels[node] = f"%{len(lines)}"
            lines.append(f"{labels[node]} = {_call(node, labels)}{_recorded(node)}")
    return lines


def _call(node: Node, labels: dict[Node, str]) -> str:
    target: Any = node.target
    args, kwargs = map_arg((node.args, node.kwargs), lambda used: _Label(labels[used]))
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        given = dict(zip((one.name for one in schema), args, strict=False)) | kwargs
        args, kwargs = (), {k.name: given[k.name] for k in schema if _matters(k, given)}
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    shown = [*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())]
    return f"{node.op} {name}({', '.join(shown)})"


def _matters(argument: Any, given: dict[str, Any]) -> bool:
    """Whether a call gives an argument another value than its default."""
    return argument.name in given and given[argument.name] != argument.default_value


def _recorded(node: Node) -> str:
    value = value_of(node)
    return f"  {value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""


class _Label(str):
    """The name of a value in a program: prints without quotes, in lists too."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
