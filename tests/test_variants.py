"""Models compiled layer by layer: one graph for all, with what each layer's plan says."""

from collections.abc import Sequence

import pytest
import torch
from emulate import Settings as Emulated
from emulate import prune
from stack import Stack, sparse
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from amber_compile import AmberConfig, Pattern, Plan, Settings, last_reports, register_model
from amber_compile.backend import compile_graph
from amber_compile.binding import Compiled
from amber_compile.graph import copy_graph
from amber_compile.plan import PlannedSite

OPTIONS = {"correction": None}
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
SECOND = ["layers.1.gate_proj", "layers.1.down_proj"]


def compile_layers(stack: Stack, backend: str = "amber_eager", **options: object) -> None:
    for layer in stack.layers:
        layer.compile(backend=backend, options=OPTIONS | options)


@torch.no_grad()
def test_layers_share_one_graph_and_no_factors() -> None:
    stack = Stack()
    compile_layers(stack)
    assert torch.equal(stack(X), sparse(stack, X))
    assert len(last_reports()) == 1


@torch.no_grad()
def test_registered_layers_follow_the_rules_of_their_own_names() -> None:
    stack = Stack()
    register_model(stack)
    compile_layers(stack, skip=["layers.1.*"])
    assert torch.equal(stack(X), sparse(stack, X, dense=SECOND))
    decisions = {site.name: site.decision for site in last_reports()[0].sites}
    assert [name for name in decisions if decisions[name].sparse] == [
        "layers.0.gate_proj",
        "layers.0.down_proj",
    ]
    assert decisions["layers.1.gate_proj"].reason == "skip='layers.1.*'"


@torch.no_grad()
def test_unregistered_layers_have_short_names() -> None:
    stack = Stack()
    compile_layers(stack, skip=["layers.1.*"])
    assert torch.equal(stack(X), sparse(stack, X))  # no name begins with layers.1
    assert [site.name for site in last_reports()[0].sites] == ["gate_proj", "up_proj", "down_proj"]


def plan_of(stack: Stack, second: Settings) -> Plan:
    """Plan all projections of the first layer 2:4, those of the second as ``second``."""
    plain = Settings(Pattern(2, 4), "weight_norm", None)
    return Plan(
        {
            name: PlannedSite(
                tuple(linear.weight.shape), plain if name.startswith("layers.0") else second
            )
            for name, linear in stack.named_modules()
            if isinstance(linear, nn.Linear)
        }
    )


@pytest.mark.parametrize("backend", ["amber_eager", pytest.param("amber", id="inductor")])
@torch.no_grad()
def test_a_plan_may_treat_each_layer_in_its_own_way(backend: str, inductor: None) -> None:
    stack = Stack()
    plan = plan_of(stack, Settings(Pattern(1, 8), "magnitude", None))
    whole = torch.compile(stack, backend="amber_eager", options={"plan": plan})(X)
    register_model(stack)
    for layer in stack.layers:
        layer.compile(backend=backend, options={"plan": plan})
    assert torch.equal(stack(X), whole)
    assert not torch.equal(whole, sparse(stack, X))
    assert [len(report.sites) for report in last_reports()] == [6, 6]


@torch.no_grad()
def test_a_plan_needs_registered_names() -> None:
    stack = Stack()
    plan = plan_of(stack, Settings())
    for layer in stack.layers:
        layer.compile(backend="amber_eager", options={"plan": plan})
    with pytest.raises(Exception, match=r"call amber_compile.register_model\(model\) first"):
        stack(X)


@torch.no_grad()
def test_weights_of_no_registered_model_run_dense_with_a_warning_until_they_are_registered() -> (
    None
):
    known, unknown = Stack(), Stack(seed=1)
    register_model(known)
    compile_layers(known, skip=["layers.1.*"])
    known(X)
    dense = unknown(X)
    compile_layers(unknown, skip=["layers.1.*"])
    with pytest.warns(UserWarning, match="belong to no registered model"):
        assert torch.equal(unknown(X), dense)
    register_model(unknown)
    assert torch.equal(unknown(X), sparse(unknown, X, dense=SECOND))
    assert len(last_reports()) == 1


@torch.no_grad()
def test_a_replaced_weight_is_registered_again() -> None:
    stack = Stack()
    register_model(stack)
    compile_layers(stack)
    stack(X)
    stack.layers[1].gate_proj = nn.Linear(64, 96, bias=False)
    register_model(stack)
    assert torch.equal(stack(X), sparse(stack, X))


@torch.no_grad()
def test_layers_that_all_stay_dense_run_what_was_compiled_whoever_calls() -> None:
    known, unknown = Stack(), Stack(seed=1)
    register_model(known)
    for stack in (known, unknown):
        dense = stack(X[:, :1])
        compile_layers(stack)
        assert torch.equal(stack(X[:, :1]), dense)  # and no warning
    assert [site.name for site in last_reports()[0].sites] == [
        f"layers.{at}.{name}_proj" for at in (0, 1) for name in ("gate", "up", "down")
    ]


@torch.no_grad()
def test_two_models_of_one_class_each_follow_their_own_weights() -> None:
    for stack in (Stack(), Stack(seed=1)):
        register_model(stack)
        compile_layers(stack, skip=["layers.1.*"])
        assert torch.equal(stack(X), sparse(stack, X, dense=SECOND))
    assert len(last_reports()) == 1


class Checkpointed(nn.Module):
    """A layer of which one projection lies in a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(64, 64, bias=False)
        self.q_proj = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(checkpoint(self.up_proj, x, use_reentrant=False))


@torch.no_grad()
def test_a_projection_in_a_nested_graph_does_not_hide_whose_the_others_are() -> None:
    model = nn.Sequential(Checkpointed(), Checkpointed())
    register_model(model)
    options = OPTIONS | {"skip": ["0.*"]}
    for layer in model:
        layer.compile(backend="amber_eager", options=options)
    result = model(X)
    first = model[0].q_proj(model[0].up_proj(X))
    middle = model[1].up_proj(first)
    kept = prune(middle, model[1].q_proj.weight, torch.arange(8), Emulated(2, 4))
    assert torch.equal(result, model[1].q_proj(kept))


@torch.no_grad()
def test_a_graph_break_takes_no_name_away_from_a_registered_model() -> None:
    class Broken(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    stack = Broken()
    register_model(stack)
    options = OPTIONS | {"skip": ["layers.1.*"]}
    result = torch.compile(stack, backend="amber_eager", options=options)(X)
    assert torch.equal(result, sparse(stack, X, dense=SECOND))
    assert len(last_reports()) == 2


@torch.no_grad()
def test_check_measures_every_layer() -> None:
    stack = Stack()
    register_model(stack)
    compile_layers(stack, check=True)
    stack(X)
    errors = {site.name: site.error for site in last_reports()[0].sites}
    for at in (0, 1):
        assert errors[f"layers.{at}.gate_proj"] > 0
        assert errors[f"layers.{at}.up_proj"] is None
    assert errors["layers.0.gate_proj"] != errors["layers.1.gate_proj"]


@torch.no_grad()
def test_an_infinite_weight_of_the_first_layer_leaves_the_second_sparse() -> None:
    stack = Stack()
    register_model(stack)
    stack.layers[0].down_proj.weight[0, 0] = torch.inf
    compile_layers(stack)
    result = stack(X)
    expected = sparse(stack, X, dense=["layers.0.down_proj"])
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    reasons = {site.name: site.decision.reason for site in last_reports()[0].sites}
    assert "not finite" in str(reasons["layers.0.down_proj"])
    assert reasons["layers.1.down_proj"] is None


@torch.no_grad()
def test_a_dense_variant_that_its_compiler_takes_apart_leaves_the_others_whole() -> None:
    def inner(gm: GraphModule, inputs: object, config: AmberConfig, rewritten: bool) -> Compiled:
        forward = copy_graph(gm)[0].forward
        for node in reversed(gm.graph.nodes):
            gm.graph.erase_node(node)
        return forward

    def taking_apart(gm: GraphModule, inputs: Sequence[object]) -> Compiled:
        config = AmberConfig(correction=None, skip=("layers.0.*",))
        return compile_graph(gm, inputs, config, inner)

    stack = Stack()
    register_model(stack)
    for layer in stack.layers:
        layer.compile(backend=taking_apart)
    first = ["layers.0.gate_proj", "layers.0.down_proj"]
    assert torch.equal(stack(X), sparse(stack, X, dense=first))
