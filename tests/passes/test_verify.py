"""What ``verify`` notices in a graph that somebody broke, and what it must let pass."""

import operator

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.functional import linear

from amber_compile.errors import VerifyError
from amber_compile.graph import copy_graph
from amber_compile.kernels import nm_select
from amber_compile.passes import verify

X = torch.randn(2, 4, 16)
W = nn.Parameter(torch.randn(8, 16))


def project(x, w):
    return linear(nm_select(x, None, 2, 4), w).relu()


@pytest.fixture
def graph(capture) -> GraphModule:
    return copy_graph(capture(project, X, W)[0])[0]


def find(gm: GraphModule, name: str) -> Node:
    return next(node for node in gm.graph.nodes if name in node.name)


def record(node: Node, *shape: int, **other: object) -> None:
    """Let ``node`` record a fake tensor of this shape."""
    with node.meta["example_value"].fake_mode:
        node.meta["example_value"] = torch.empty(shape, **other)


def test_every_node_that_computes_a_tensor_is_checked(graph):
    assert verify(graph) == 3


def test_amber_only_checks_what_reads_a_selection(graph):
    assert verify(graph, amber_only=True) == 1


@pytest.mark.parametrize("amber_only", [False, True])
@pytest.mark.parametrize(
    ("shape", "other", "message"),
    [
        ((2, 4, 9), {}, r"computes .*'8'\].*records .*'9'\]"),
        ((8, 8), {}, r"records \(\['8', '8'\]"),
        ((2, 4, 8), {"dtype": torch.bfloat16}, r"computes .*float32.*records .*bfloat16"),
        ((2, 4, 8), {"device": "meta"}, r"records .*meta"),
    ],
)
def test_a_value_that_the_node_does_not_compute(graph, shape, other, message, amber_only):
    record(find(graph, "linear"), *shape, **other)
    with pytest.raises(VerifyError, match=message):
        verify(graph, amber_only=amber_only)


def test_a_node_used_before_it_is_defined(graph):
    selection = find(graph, "nm_select")
    find(graph, "linear").append(selection)
    with pytest.raises(VerifyError, match="malformed"):
        verify(graph)


def test_an_operand_of_another_size(graph):
    record(find(graph, "w"), 8, 32)
    with pytest.raises(VerifyError, match=r"linear.* does not run on its inputs"):
        verify(graph)


def test_a_wrong_argument_of_an_operator(graph):
    selection = find(graph, "nm_select")
    selection.args = (selection.args[0], None, 2, 3)
    with pytest.raises(VerifyError, match=r"nm_select.* does not run .*pattern"):
        verify(graph)


def test_an_operator_of_ours_without_a_record(graph):
    find(graph, "nm_select").meta.pop("example_value")
    with pytest.raises(VerifyError, match=r"nm_select.* records no tensor"):
        verify(graph)


def test_the_first_culprit_is_named(graph):
    record(find(graph, "linear"), 1)
    record(find(graph, "relu"), 1)
    with pytest.raises(VerifyError, match="%linear"):
        verify(graph)


def test_another_nodes_mistake_is_none_of_ambers(graph):
    record(find(graph, "relu"), 1)
    assert verify(graph, amber_only=True) == 1
    with pytest.raises(VerifyError, match="%relu"):
        verify(graph)


def test_a_node_without_a_record_is_left_alone(graph):
    find(graph, "relu").meta.pop("example_value")
    assert verify(graph) == 2


def test_what_verify_looks_at_stays_as_it_was(graph):
    before = {node: dict(node.meta) for node in graph.graph.nodes}
    verify(graph)
    assert {node: node.meta for node in graph.graph.nodes} == before


def test_symbolic_sizes(capture):
    assert verify(capture(project, X, W, dynamic=True)[0]) == 3


def test_a_symbolic_size_in_the_wrong_place(capture):
    gm = capture(project, X, W, dynamic=True)[0]
    node = find(gm, "linear")
    node.meta["example_value"] = node.meta["example_value"].transpose(0, 1)
    with pytest.raises(VerifyError, match="linear"):
        verify(gm)


CHOICES = {
    "a mask": lambda x: x[x[..., 0] > 0],
    "masked_select": lambda x: torch.masked_select(x, x > 0).unsqueeze(-1).repeat(1, 16),
    "repeat_interleave": lambda x: torch.repeat_interleave(x[0], (x[0, :, 0] > 0).long(), dim=0),
    "a slice": lambda x: x[0, : (x[0, :, 0] > 0).sum().item()],
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES.keys())
def test_sizes_that_depend_on_data(capture, choose):
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        gm = capture(lambda x, w: project(choose(x), w), X, W)[0]
    assert verify(gm) > verify(gm, amber_only=True) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_in_the_graph(capture, enabled):
    def cast(x, w):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = project(x, w)
        return linear(y.float(), w.T)

    assert verify(capture(cast, X, W)[0]) >= 4


def test_nested_autocast(capture):
    def cast(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            a = project(x, w)
            with torch.autocast("cpu", enabled=False):
                b = project(x, w)
            c = project(x, w)
        return a, b, c, project(x, w)

    gm = capture(cast, X, W)[0]
    dtypes = [n.meta["example_value"].dtype for n in gm.graph.nodes if "linear" in n.name]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    assert verify(gm) == 12


def test_autocast_around_the_graph(capture):
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(capture(project, X, W)[0]) == 3


def test_verify_opens_no_autocast_of_its_own(capture):
    def cast(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return project(x, w)

    gm = capture(cast, X, W)[0]
    record(find(gm, "linear"), 1)
    with pytest.raises(VerifyError):
        verify(gm)
    assert not torch.is_autocast_enabled("cpu")


def test_writes_are_not_repeated(capture):
    def write(x, w):
        y = x + 1
        y.add_(1)
        y[0] = 2
        operator.iadd(y, 1)
        torch.mul(y, 2, out=y)
        return project(y, w)

    assert verify(capture(write, X, W)[0]) == 4  # x + 1 and the three of project


def test_gradients_are_not_asked_of_the_operators(graph):
    with torch.enable_grad():
        assert verify(graph) == 3
