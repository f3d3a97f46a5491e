"""Copies of graphs, further inputs, inserted calls, and which nodes write to what."""

import operator

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.nn.functional import dropout, leaky_relu, linear, relu, selu

from amber_compile.graph import (
    add_input,
    call,
    copy_graph,
    insert_call,
    positions,
    storage_of,
    written,
    written_storages,
)
from amber_compile.kernels import nm_select
from amber_compile.projection import fake

X = torch.randn(2, 4, 16)
W = nn.Parameter(torch.randn(8, 16))


def trace(function, *inputs, dynamic=None) -> tuple[GraphModule, list]:
    found = []

    def probe(gm, example_inputs):
        found.append((gm, list(example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=probe, dynamic=dynamic)(*inputs)
    return found[0]


def project(x, w):
    return linear(x, w)


def find(gm: GraphModule, name: str):
    return next(node for node in gm.graph.nodes if name in node.name)


# ---- copies ----


def test_a_copy_has_its_own_nodes():
    gm, inputs = trace(project, X, W)
    copy, nodes = copy_graph(gm)
    assert [node.name for node in copy.graph.nodes] == [node.name for node in gm.graph.nodes]
    assert not set(copy.graph.nodes) & set(gm.graph.nodes)
    assert set(nodes.values()) <= set(copy.graph.nodes)
    assert torch.equal(copy(*inputs)[0], gm(*inputs)[0])


def test_what_is_done_to_a_copy_does_not_reach_the_original():
    gm, _ = trace(project, X, W)
    before = str(gm.graph)
    copy, _ = copy_graph(gm)
    add_input(copy.graph, "factor", fake(find(copy, "x")))
    find(copy, "linear").meta["example_value"] = None
    copy.graph.erase_node(find(copy, "factor"))
    copy.meta["own"] = True
    assert str(gm.graph) == before
    assert find(gm, "linear").meta["example_value"] is not None
    assert "own" not in gm.meta


def test_dynamo_finds_its_inputs_again_and_the_copy_holds_none():
    held = []

    def backend(gm, inputs):
        copy, nodes = copy_graph(gm)
        held.extend(
            ("grapharg" in old.meta, "grapharg" in nodes[old].meta) for old in positions(gm)
        )
        return copy.forward

    with torch.no_grad():
        torch.compile(project, backend=backend)(X, W)
    assert held == [(True, False)] * 2


def test_a_copy_keeps_what_aotautograd_reads():
    gm, _ = trace(project, X, W)
    copy, nodes = copy_graph(gm)
    for old in positions(gm):
        assert nodes[old]._dynamo_source == old._dynamo_source
    assert copy._param_name_to_source == gm._param_name_to_source
    assert copy.meta == gm.meta
    assert copy.meta is not gm.meta
    assert copy.graph._tracer_cls is gm.graph._tracer_cls
    assert copy.graph.output_node().meta == gm.graph.output_node().meta


def test_a_copy_of_a_copy():
    gm, inputs = trace(project, X, W)
    copy, _ = copy_graph(copy_graph(gm)[0])
    assert torch.equal(copy(*inputs)[0], gm(*inputs)[0])


def test_a_graph_that_dynamo_did_not_make():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 8), nn.ReLU()))
    copy, _ = copy_graph(gm)
    assert torch.equal(copy(X), gm(X))


# ---- inputs ----


def test_inputs_are_appended_after_the_last():
    gm, inputs = trace(project, X, W)
    copy, _ = copy_graph(gm)
    mode = fake(find(copy, "w")).fake_mode
    with mode:
        first, second = torch.empty(16), torch.empty(3)
    nodes = [add_input(copy.graph, "amber", first), add_input(copy.graph, "amber", second)]
    assert list(positions(copy))[-2:] == nodes
    assert [positions(copy)[node] for node in nodes] == [2, 3]
    assert nodes[0].name != nodes[1].name
    assert fake(nodes[0]) is first
    assert nodes[0]._dynamo_source is None
    copy.graph.lint()
    copy.recompile()
    assert torch.equal(copy(*inputs, None, None)[0], gm(*inputs)[0])


# ---- calls ----


def test_a_call_stands_before_its_site_and_belongs_to_its_module():
    gm, _ = trace(nn.Sequential(nn.Linear(16, 8)), X)
    copy, _ = copy_graph(gm)
    site = find(copy, "input")
    node = insert_call(copy.graph, site, nm_select, site.args[0], None, 2, 4)
    assert node.next is site
    assert node.meta["nn_module_stack"] == site.meta["nn_module_stack"]
    assert node.meta["example_value"].shape == X.shape
    assert type(node.meta["example_value"]) is type(fake(site))


def test_a_method_call():
    gm, _ = trace(project, X, W)
    copy, _ = copy_graph(gm)
    site = find(copy, "linear")
    node = insert_call(copy.graph, site, "view", site.args[0], -1, 16)
    assert (node.op, node.target) == ("call_method", "view")
    assert tuple(fake(node).shape) == (8, 16)


def test_a_call_on_symbolic_sizes_puts_no_guard_on_them():
    gm, _ = trace(project, X, W, dynamic=True)
    copy, _ = copy_graph(gm)
    site = find(copy, "linear")
    environment = fake(site.args[0]).fake_mode.shape_env
    before = len(environment.guards)
    node = insert_call(copy.graph, site, nm_select, site.args[0], None, 2, 4, None, 1, 64)
    assert [type(size) for size in fake(node).shape] == [torch.SymInt, torch.SymInt, int]
    assert len(environment.guards) == before


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "result"),
    [
        (operator.add, (2, 3), {}, 5),
        ("upper", ("a",), {}, "A"),
        ("split", ("a,b",), {"sep": ","}, ["a", "b"]),
    ],
)
def test_call(target, args, kwargs, result):
    assert call(target, args, kwargs) == result


# ---- writes ----


def node(target, *others, **kwargs):
    """Return a call of ``target`` on ``x`` and ``others``."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    args = (x, *(y if other == "y" else other for other in others))
    kwargs = {key: y if value == "y" else value for key, value in kwargs.items()}
    kind = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(kind, target, args, kwargs)


@pytest.mark.parametrize(
    ("one", "names"),
    [
        (node("add_", "y"), ["x"]),
        (node("copy_", "y"), ["x"]),
        (node("t_"), ["x"]),
        (node("__setitem__", 0, "y"), ["x"]),
        (node("__iadd__", "y"), ["x"]),
        (node(operator.setitem, 0, "y"), ["x"]),
        (node(operator.iadd, "y"), ["x"]),
        (node(operator.imatmul, "y"), ["x"]),
        (node(operator.ilshift, "y"), ["x"]),
        (node(torch.relu_), ["x"]),
        (node(torch._C._nn.relu6_), ["x"]),
        (node(relu, inplace=True), ["x"]),
        (node(leaky_relu, 0.1, True), ["x"]),
        (node(selu, True), ["x"]),
        (node(dropout, 0.5, True, True), ["x"]),
        (node(torch.mul, 2, out="y"), ["y"]),
        (node(torch.ops.aten.add_.Tensor, "y"), ["x"]),
        (node(torch.ops.aten.add.out, "y", out="y"), ["y"]),
        (node(torch.ops.aten.mul_, "y"), ["x"]),
        (node(torch.ops.aten.mul, "y", out="y"), ["y"]),
        (node(torch.ops.aten._foreach_add_.Scalar, 1), ["x"]),
        (node(torch.ops.higher_order.wrap, "y"), ["x", "y"]),
    ],
)
def test_writes(one, names):
    assert [operand.name for operand in written(one)] == names


@pytest.mark.parametrize(
    "one",
    [
        node("add", "y"),
        node("__add__", "y"),
        node("__getitem__", 0),
        node("contiguous"),
        node(operator.add, "y"),
        node(operator.getitem, 0),
        node(operator.index),
        node(operator.invert),
        node(operator.is_, None),
        node(operator.and_, "y"),
        node(relu),
        node(relu, inplace=False),
        node(leaky_relu, 0.1, False),
        node(leaky_relu, True),  # a slope, not inplace
        node(dropout, 0.5, True),
        node(torch.mul, "y"),
        node(linear, "y"),
        node(torch.ops.aten.add.Tensor, "y"),
        node(torch.ops.aten.mul, "y"),
        node(torch.ops.amber.nm_select.default, None, 2, 4),
        node(torch.amp.autocast_mode._enter_autocast, None, True, None),
    ],
)
def test_no_writes(one):
    assert written(one) == []


def test_views_share_a_storage():
    def views(x):
        y = x + 1
        return y, y.view(-1, 16), y[0], y.transpose(0, 1), y.clone(), y * 1

    gm, _ = trace(views, X)
    y, *others = (fake(one) for one in gm.graph.output_node().args[0])
    shared = [storage_of(one) == storage_of(y) for one in others]
    assert shared == [True, True, True, False, False]


def test_the_storages_that_a_graph_writes_to():
    def write(x, y, z):
        x[0].add_(1)
        torch.mul(y, 2, out=y)
        return x + y + z

    gm, _ = trace(write, X.clone(), X.clone(), X.clone())
    changed = written_storages(gm.graph)
    places = {place.name: storage_of(fake(place)) in changed for place in positions(gm)}
    assert places == {"l_x_": True, "l_y_": True, "l_z_": False}
