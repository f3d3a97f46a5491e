"""Stand-ins for models and devices: shapes without values, graphs moved to another device."""

import pytest
import torch
from stack import Stack
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from amber_compile.fake_model import OnAnyBuild, has_no_values, on_device, stand_in, without_values
from amber_compile.graph import storage_of
from amber_compile.projection import fake, fake_mode_of, value_of

CUDA = torch.device("cuda")


class Odd(nn.Module):
    """Tensors wherever a module may hold them: tied, frozen, in a buffer, in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.one.bias.requires_grad_(False)
        self.register_buffer("table", torch.zeros(3))
        self.plain = torch.zeros(5)
        self.options = {"a": [1]}


def traced(model: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    graphs = []

    def keep(gm: GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(*inputs)
    return graphs[0]


def test_a_copy_has_every_tensor_without_its_values() -> None:
    with torch.device("meta"):
        model = Odd()
    copy = without_values(model, FakeTensorMode())
    found = [*copy.parameters(), *copy.buffers(), copy.plain]
    assert all(isinstance(one, FakeTensor) and one.device.type == "cpu" for one in found)
    assert [one.shape for one in copy.parameters()] == [one.shape for one in model.parameters()]
    assert copy.one.weight is copy.two.weight
    assert isinstance(copy.one.weight, nn.Parameter)
    assert (copy.one.weight.requires_grad, copy.one.bias.requires_grad) == (True, False)
    assert copy.options is not model.options


def test_the_model_itself_is_left_alone() -> None:
    with torch.device("meta"):
        model = Odd()
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    without_values(model, FakeTensorMode())
    assert before == {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    assert model.plain.is_meta


def test_a_model_of_half_its_values_has_none() -> None:
    model = Odd()
    assert not has_no_values(model)
    assert not has_no_values(nn.Identity())
    model.register_buffer("later", torch.empty(1, device="meta"))
    assert has_no_values(model)
    with FakeTensorMode():
        assert has_no_values(Odd())


@pytest.mark.parametrize("value", [3, None, "x"])
def test_what_is_no_tensor_stays(value: object) -> None:
    assert stand_in(value, FakeTensorMode()) is value


def test_a_graph_is_moved_and_its_original_is_not() -> None:
    gm = traced(Stack(), torch.zeros(2, 3, 64))
    moved = on_device(gm, CUDA)
    assert {fake(node).device.type for node in gm.graph.nodes if _has_tensor(node)} == {"cpu"}
    assert {fake(node).device.type for node in moved.graph.nodes if _has_tensor(node)} == {"cuda"}
    for old, new in zip(gm.graph.nodes, moved.graph.nodes, strict=True):
        if _has_tensor(old):
            assert fake(old).shape == fake(new).shape
            assert isinstance(fake(old), nn.Parameter) == isinstance(fake(new), nn.Parameter)


def test_views_stay_views_of_one_storage() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(-1).sin() + x.view(-1)

    moved = on_device(traced(Views(), torch.zeros(2, 3)), CUDA)
    first, second = (node for node in moved.graph.nodes if node.target == "view")
    (x,) = moved.graph.find_nodes(op="placeholder")
    assert storage_of(fake(first)) == storage_of(fake(second)) == storage_of(fake(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for builds without CUDA")
def test_what_asks_for_the_device_works_without_it() -> None:
    gm = on_device(traced(Stack(), torch.zeros(2, 3, 64)), CUDA)
    x = fake(gm.graph.find_nodes(op="placeholder")[0])
    with OnAnyBuild(), fake_mode_of(x):
        part = x[..., :2]
        assert part.device == x.device
        assert storage_of(part) == storage_of(x)
        assert part.contiguous().is_contiguous()
        assert part.contiguous().device == x.device


def test_nothing_else_is_changed_by_it() -> None:
    x = torch.arange(6.0).view(2, 3)
    with OnAnyBuild():
        assert x[0].tolist() == [0, 1, 2]
        assert x.t().contiguous().tolist() == [[0, 3], [1, 4], [2, 5]]


def _has_tensor(node: torch.fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)
