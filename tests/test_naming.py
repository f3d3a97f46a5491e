"""Qualified names: read off Dynamo's sources, and completed by registered models."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from amber_compile import register_model
from amber_compile.naming import full_name, owners, registered_shapes
from amber_compile.passes import find_projections

X = torch.randn(2, 4, 16)


def square() -> nn.Linear:
    return nn.Linear(16, 16, bias=False)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = square(), square()

    def forward(self, x):
        return self.o_proj(self.q_proj(x))


class Layer(nn.Module):
    def __init__(self, down: int = 16) -> None:
        super().__init__()
        self.attn = Attention()
        self.down_proj = nn.Linear(16, down, bias=False)

    def forward(self, x):
        return self.down_proj(self.attn(x))


class Model(nn.Module):
    def __init__(self, *downs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(down) for down in downs or (16, 16))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def trace(function, *inputs):
    """Return the projections of ``function`` and the weights that it is called with."""
    found = []

    def probe(gm, example_inputs):
        found.append((gm, list(example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=probe)(*(inputs or (X,)))
    ((gm, values),) = found
    places = gm.graph.find_nodes(op="placeholder")
    projections = find_projections(gm)
    return projections, [values[places.index(one.weight)] for one in projections]


def names(function, *inputs) -> list[str]:
    return [one.name for one in trace(function, *inputs)[0]]


# ---- names in a graph ----


def test_a_model():
    expected = ["attn.q_proj", "attn.o_proj", "down_proj"]
    assert names(Layer()) == expected
    assert names(Model()) == [f"layers.{at}.{name}" for at in (0, 1) for name in expected]


class Odd(nn.Module):
    """Weights in all the places where people keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.plain_list = [square(), square()]
        self.plain_dict = {"k": square()}
        self.module_dict = nn.ModuleDict({"it's": square(), "a b": square()})
        self.bare = nn.Parameter(torch.randn(16, 16))
        self.several = nn.ParameterList([nn.Parameter(torch.randn(16, 16))])
        self.register_buffer("frozen", torch.randn(16, 16))
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.experts = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x):
        x = self.plain_list[1](self.plain_list[0](x))
        x = self.plain_dict["k"](x)
        x = self.module_dict["a b"](self.module_dict["it's"](x))
        x = linear(linear(x, self.bare), self.several[0])
        x = linear(linear(x, self.frozen), self.weight)
        return x @ self.experts[1]


def test_odd_places():
    assert names(Odd()) == [
        *("plain_list.0", "plain_list.1", "plain_dict.k"),
        *("module_dict.it's", "module_dict.a b"),
        *("bare", "several.0", "frozen", "weight", "experts"),
    ]


def test_functional_use_of_a_modules_weight():
    model = Layer()
    assert names(lambda x: linear(x, model.attn.q_proj.weight)) == ["attn.q_proj"]


def test_a_tied_weight_is_named_by_its_call():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(16, 16), square()
            self.lm_head.weight = self.embed.weight

        def forward(self, tokens):
            return self.lm_head(self.embed(tokens))

    assert names(Tied(), torch.zeros(2, 4, dtype=torch.long)) == ["lm_head"]


def test_an_adapted_layer_keeps_its_name():
    class Adapted(nn.Module):
        """As PEFT wraps a linear: the base layer, and a low-rank addition to it."""

        def __init__(self) -> None:
            super().__init__()
            self.base_layer = square()
            self.lora_A = nn.ModuleDict({"default": square()})

        def forward(self, x):
            return self.base_layer(x) + self.lora_A["default"](x)

    model = Layer()
    model.attn.q_proj = Adapted()
    assert names(model)[:2] == ["attn.q_proj", "attn.q_proj.lora_A.default"]


def test_a_layer_compiled_inside_keeps_its_name():
    model = Model()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert names(model)[0] == "layers.0.attn.q_proj"


def test_variables_and_containers():
    model, layers = Layer(), [Attention(), Attention()]
    bare, several = nn.Parameter(torch.randn(16, 16)), {"v": nn.Parameter(torch.randn(16, 16))}
    assert names(lambda x: model(x)) == ["attn.q_proj", "attn.o_proj", "down_proj"]
    assert names(lambda x: layers[1](x)) == ["layers.1.q_proj", "layers.1.o_proj"]
    assert names(lambda x: linear(linear(x, bare), several["v"])) == ["bare", "several.v"]
    assert names(lambda module, x: module(x), model, X)[0] == "attn.q_proj"


def test_methods_and_other_objects():
    class Server:
        def __init__(self) -> None:
            self.model = Layer()

        def run(self, x):
            return self.model(x)

    assert names(Server().run)[0] == "model.attn.q_proj"
    assert names(Layer().forward)[0] == "attn.q_proj"


def test_a_linear_compiled_on_its_own_has_at_least_a_name():
    assert names(square()) == ["weight"]


# ---- registered models ----


def test_a_layer_compiled_on_its_own_gets_its_full_name():
    model = Model()
    register_model(model)
    projections, weights = trace(model.layers[1])
    found = [full_name(one.name, weight) for one, weight in zip(projections, weights, strict=True)]
    assert found == ["layers.1.attn.q_proj", "layers.1.attn.o_proj", "layers.1.down_proj"]


def test_a_linear_compiled_on_its_own_gets_its_full_name():
    model = Model()
    register_model(model)
    assert owners(*trace(model.layers[1].down_proj)) == [("layers.1.down_proj",)]


def test_a_name_that_is_full_stays():
    model = Model()
    register_model(model)
    projections, weights = trace(model)
    assert owners(projections, weights) == [tuple(one.name for one in projections)]


def test_an_unregistered_weight_keeps_its_local_name():
    projections, weights = trace(Model().layers[1])
    assert owners(projections, weights) == [("attn.q_proj", "attn.o_proj", "down_proj")]
    assert full_name("q_proj", torch.empty(16, 16)) == "q_proj"
    assert registered_shapes(torch.empty(16, 16)) == registered_shapes(None) == {}


def test_a_registered_weight_under_another_name_keeps_that():
    model = Model()
    register_model(model)
    assert full_name("head", model.layers[0].down_proj.weight) == "head"
    assert full_name("n_proj", model.layers[0].down_proj.weight) == "n_proj"  # no part of a word


def test_layers_that_share_a_graph_are_its_owners():
    model = Model(16, 16, 16)
    register_model(model)
    projections, weights = trace(model.layers[1])
    found = owners(projections, weights)
    assert found[0] == ("layers.1.attn.q_proj", "layers.1.attn.o_proj", "layers.1.down_proj")
    assert sorted(name[0] for name in found) == [f"layers.{at}.attn.q_proj" for at in range(3)]
    assert len(set(found)) == 3


def test_a_layer_of_another_shape_is_no_owner():
    model = Model(16, 8, 16)
    register_model(model)
    found = owners(*trace(model.layers[0]))
    assert [name[0] for name in found] == ["layers.0.attn.q_proj", "layers.2.attn.q_proj"]


def test_a_layer_that_lacks_a_projection_is_no_owner():
    model = Model(16, 16)
    model.layers[1].attn.o_proj = nn.Identity()
    register_model(model)
    assert len(owners(*trace(model.layers[0]))) == 1


def test_two_models_with_the_same_names_are_told_apart():
    large, small = Model(16, 16, 16), Model(8, 16)  # a model and its draft model, say
    register_model(large)
    register_model(small)
    assert registered_shapes(large.layers[0].down_proj.weight)["layers.0.down_proj"] == (16, 16)
    assert registered_shapes(small.layers[0].down_proj.weight)["layers.0.down_proj"] == (8, 16)
    found = owners(*trace(large.layers[0]))
    assert [name[0] for name in found] == [f"layers.{at}.attn.q_proj" for at in range(3)]
    assert [name[2] for name in owners(*trace(small.layers[0]))] == ["layers.0.down_proj"]


def test_two_models_in_one_graph():
    first, second = Model(16, 16), Model(16, 16)
    register_model(first)
    register_model(second)

    one, other = first.layers[1], second.layers[1]

    def both(x):
        return other.down_proj(one.attn(x))

    attention = [("layers.1.attn.q_proj", "layers.1.attn.o_proj")]
    attention += [("layers.0.attn.q_proj", "layers.0.attn.o_proj")]
    assert owners(*trace(both)) == [(*names, "layers.1.down_proj") for names in attention]


def test_a_compiled_model_is_registered_under_its_own_names():
    model = Model()
    register_model(torch.compile(model, backend="eager"))
    assert full_name("attn.q_proj", model.layers[0].attn.q_proj.weight) == "layers.0.attn.q_proj"


def test_registered_names_of_adapted_layers():
    model = Model()
    base = model.layers[0].attn.q_proj
    model.layers[0].attn.q_proj = nn.Module()
    model.layers[0].attn.q_proj.base_layer = base
    register_model(model)
    assert full_name("attn.q_proj", base.weight) == "layers.0.attn.q_proj"


def test_registering_again_takes_the_new_names():
    model = Model()
    weight = model.layers[0].down_proj.weight
    register_model(model.layers[0])
    assert full_name("down_proj", weight) == "down_proj"
    register_model(model)
    assert full_name("down_proj", weight) == "layers.0.down_proj"


def test_only_matrices_are_projections():
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    register_model(model)
    assert registered_shapes(model[0].weight) == {"0": (8, 16)}


def test_models_are_held_weakly():
    model = Model()
    kept = model.layers[0].down_proj.weight
    register_model(model)
    assert len(registered_shapes(kept)) == 6
    del model
    gc.collect()
    assert registered_shapes(kept) == {"layers.0.down_proj": (16, 16)}


@pytest.mark.parametrize("model", [None, "model", torch.empty(2), Layer])
def test_only_modules_are_registered(model):
    with pytest.raises(TypeError, match=r"register_model takes a torch\.nn\.Module, not "):
        register_model(model)
