"""What the passes insert, in the words of a graph behind AOTAutograd."""

import operator

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from amber_compile.graph import insert_call
from amber_compile.passes.spell_in_aten import is_aten, spell_in_aten
from amber_compile.projection import fake

aten = torch.ops.aten
X, V = torch.randn(2, 8, 16), torch.randn(16)


def graph_of(function, *inputs) -> GraphModule:
    return make_fx(function, tracing_mode="symbolic")(*inputs)


def spelt(insert, *inputs) -> tuple[list[str], int, GraphModule]:
    """Insert into a graph of ``x + 1`` as a pass does; return its calls and how many were spelt."""
    gm = graph_of(lambda *given: given[0] + 1, *inputs)
    end = gm.graph.output_node()
    places = gm.graph.find_nodes(op="placeholder")
    end.args = (insert(gm.graph, end, *places),)
    count = spell_in_aten(gm)
    gm.graph.lint()
    for node in gm.graph.nodes:
        assert "example_value" not in node.meta
        assert node.op == "output" or "val" in node.meta
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"], count, gm


def check(insert, expected, wanted, *inputs):
    """Assert what ``insert`` becomes, and that the graph still computes ``wanted``."""
    calls, count, gm = spelt(insert, *inputs)
    assert calls == ["aten.add.Tensor", *expected]
    assert count == 1
    assert is_aten(gm)
    assert torch.equal(gm(*inputs), wanted)


@pytest.mark.parametrize("python", [operator.mul, operator.add])
def test_scale_and_bias(python):
    name = f"aten.{python.__name__}.Tensor"
    check(lambda g, at, x, v: insert_call(g, at, python, x, v), [name], python(X, V), X, V)


def test_a_cast():
    def insert(graph, at, x):
        return insert_call(graph, at, "to", x, torch.bfloat16)

    check(insert, ["prims.convert_element_type.default"], X.bfloat16(), X)


@pytest.mark.parametrize(
    "rows", [slice(0, 3), slice(3, None), slice(None, 3), (..., slice(0, 3)), (..., slice(3, None))]
)
def test_rows_and_columns(rows):
    matrix = torch.randn(8, 16)

    def insert(graph, at, w):
        return insert_call(graph, at, operator.getitem, w, rows)

    check(insert, ["aten.slice.Tensor"], matrix[rows], matrix)


def test_a_row_of_a_vector():
    def insert(graph, at, v):
        return insert_call(graph, at, operator.getitem, v, slice(4, None))

    check(insert, ["aten.slice.Tensor"], V[4:], V)


def test_a_reshape_reads_symbolic_sizes():
    flat = X.flatten(0, 1)

    def insert(graph, at, x, flat):
        return insert_call(graph, at, "view_as", flat, x)

    calls, count, gm = spelt(insert, X, flat)
    assert calls[-1] == "aten.reshape.default"
    assert set(calls[1:-1]) == {"aten.sym_size.int"}
    assert count == 1
    longer = torch.randn(2, 20, 16)
    assert torch.equal(gm(longer, longer.flatten(0, 1)), longer)


# ---- left alone ----------------------------------------------------------------------------------


def test_other_nodes_are_left_alone():
    gm = graph_of(lambda x: (x * 2).to(torch.bfloat16)[:, 1:].relu(), X)
    before = str(gm.graph)
    assert spell_in_aten(gm) == 0
    assert str(gm.graph) == before


def test_items_of_a_tuple_are_taken_as_before():
    def insert(graph, at, x):
        both = insert_call(graph, at, torch.ops.amber.quantize_rows.default, x, None, "int8")
        return insert_call(graph, at, operator.getitem, both, 1)

    calls, count, gm = spelt(insert, X)
    assert calls[-2:] == ["amber.quantize_rows.default", "<built-in function getitem>"]
    assert count == 0
    assert is_aten(gm)
    assert fake(gm.graph.output_node().args[0]).dtype == torch.float32


# ---- whose graphs they are -----------------------------------------------------------------------


def test_a_graph_of_dynamo_is_none(capture):
    assert not is_aten(capture(lambda x: torch.relu(x) * 2, X)[0])
    assert not is_aten(capture(lambda x: torch.ops.aten.relu(x).view(-1), X)[0])


def test_a_graph_that_calls_nothing_is_none():
    assert not is_aten(graph_of(lambda x: x, X))


def test_sizes_computed_in_python_do_not_tell():
    length = torch.export.Dim("length", min=2)

    class Model(torch.nn.Module):
        def forward(self, x):
            return x.sum() + x.new_zeros(torch.sym_max(x.shape[1], 4)).sum()

    program = torch.export.export(Model(), (X,), dynamic_shapes=({1: length},))
    assert any(node.target is torch.sym_max for node in program.graph.nodes)
    assert is_aten(program.graph_module)
