"""What a plan's tensors do in a compiled model, whole or layer by layer."""

import pytest
import torch
from emulate_w8a8 import rows
from stack import Stack
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import linear

from amber_compile import Plan, Settings, last_reports, register_model
from amber_compile.kernels import nm_select
from amber_compile.plan import PlannedSite
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
SPARSE = Settings(score="calibrated", output_scale=True, output_bias=True, updated_weight=True)
INT8 = Quantization("int8", "outstanding")


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape) + 0.5


def plan_of(stack: Stack, quantization: Quantization | None = None) -> Plan:
    """Sparsify gate and down projections, with other tensors in each layer."""
    torch.manual_seed(1)
    sites, tensors = {}, {}
    for name, module in stack.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        outputs, channels = module.weight.shape
        sparse = not name.endswith("up_proj")
        sites[name] = PlannedSite((outputs, channels), SPARSE if sparse else "why", quantization)
        held = {} if quantization is None else {"smooth": drawn(channels)}
        if sparse:
            held |= {"factor": drawn(channels), "output_scale": drawn(outputs)}
            held |= {"output_bias": drawn(outputs), "weight": drawn(outputs, channels) - 1}
        tensors[name] = held
    return Plan(sites, {}, tensors=PlanTensors(tensors))


@torch.no_grad()
def expected(stack: Stack, x: Tensor, plan: Plan) -> Tensor:
    """Return what a stack computes under ``plan``, eagerly and in other words."""
    for at, layer in enumerate(stack.layers):

        def run(name: str, x: Tensor, at: int = at, layer: nn.Module = layer) -> Tensor:
            site, module = f"layers.{at}.{name}", layer.get_submodule(name)
            held = plan.tensors.to_dict().get(site, {})
            if "factor" not in held:
                return product(x, module.weight, held.get("smooth"))
            kept = nm_select(x, held["factor"], 2, 4)
            if "smooth" not in held:
                y = linear(kept, held["weight"])
                return (y * held["output_scale"]) + held["output_bias"]
            scales = held["output_scale"], held["output_bias"]
            return product(kept, held["weight"], held["smooth"], *scales)

        x = x + run("down_proj", run("gate_proj", x).relu() * run("up_proj", x))
    return x


def product(
    x: Tensor,
    weight: Tensor,
    smooth: Tensor | None,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Multiply, by W8A8 if there is a smooth vector."""
    if smooth is None:
        return linear(x, weight)
    codes, row_scale = rows(x * smooth)
    weight_codes, weight_scale = rows(weight / smooth)
    y = (codes.double() @ weight_codes.double().T).float()
    return y * row_scale * (weight_scale[:, 0] * scale) + bias


@pytest.mark.parametrize("quantization", [None, INT8])
@torch.no_grad()
def test_a_whole_model_has_the_tensors_of_each_projection(quantization) -> None:
    stack = Stack()
    plan = plan_of(stack, quantization)
    compiled = torch.compile(stack, backend="amber_eager", options={"plan": plan})
    torch.testing.assert_close(compiled(X), expected(stack, X, plan), rtol=0, atol=0)
    decisions = {site.name: site.decision for site in last_reports()[0].sites}
    assert [decisions[name].sparse for name in plan.sites] == [True, False, True] * 2
    assert all(decisions[name].quantization == quantization for name in plan.sites)


@pytest.mark.parametrize("quantization", [None, INT8])
@torch.no_grad()
def test_layers_that_share_a_graph_have_their_own_tensors(quantization) -> None:
    stack = Stack()
    register_model(stack)
    plan = plan_of(stack, quantization)
    for layer in stack.layers:
        layer.compile(backend="amber_eager", options={"plan": plan})
    assert torch.equal(stack(X), expected(stack, X, plan))
    assert len(last_reports()) == 1  # one graph


@torch.no_grad()
def test_a_saved_plan_computes_the_same(tmp_path) -> None:
    stack = Stack()
    plan = plan_of(stack, INT8)
    plan.save(tmp_path / "stack.plan")
    options = {"plan": str(tmp_path / "stack.plan")}
    compiled = torch.compile(stack, backend="amber_eager", options=options)
    assert torch.equal(compiled(X), expected(stack, X, plan))


@torch.no_grad()
def test_a_changed_weight_does_not_change_what_the_plan_has() -> None:
    stack = Stack()
    plan = plan_of(stack)
    compiled = torch.compile(stack, backend="amber_eager", options={"plan": plan})
    before = compiled(X)
    for name, module in stack.named_modules():
        if name.endswith(("gate_proj", "down_proj")):
            module.weight.mul_(2)  # the plan's weights are multiplied by, not these
    assert torch.equal(compiled(X), before)
    stack.layers[0].up_proj.weight.mul_(2)
    assert not torch.equal(compiled(X), before)
    assert torch.equal(compiled(X), expected(stack, X, plan))


@torch.no_grad()
def test_a_changed_weight_is_quantised_again() -> None:
    stack = Stack()
    compiled = torch.compile(stack, backend="amber_eager", options={"quantize": "int8"})
    before = compiled(X)
    stack.layers[0].down_proj.weight.mul_(2)
    after = compiled(X)
    assert not torch.equal(after, before)
    torch.compiler.reset()
    again = torch.compile(Stack(), backend="amber_eager", options={"quantize": "int8"})
    assert torch.equal(again(X), before)


@torch.no_grad()
def test_inductor_computes_what_the_graph_says(inductor) -> None:
    """Sums of products of codes are exact; what follows them is fused, and may round once less."""
    stack = Stack()
    plan = plan_of(stack, INT8)
    compiled = torch.compile(stack, backend="amber", options={"plan": plan})
    wanted = expected(stack, X, plan)
    error = (compiled(X) - wanted).norm() / wanted.norm()
    assert error < 1e-2  # a code may differ by one where an input did by a rounding
    assert last_reports()[0].graphs[0].fallback is None


@torch.no_grad()
def test_a_weight_that_is_not_finite_runs_dense_with_a_warning() -> None:
    stack = Stack()
    stack.layers[0].up_proj.weight[3, 4] = torch.inf
    compiled = torch.compile(stack, backend="amber_eager", options={"quantize": "int8"})
    with pytest.warns(UserWarning, match="the dense graph runs, uncompiled"):
        answer = compiled(X)
    assert torch.equal(answer.isfinite(), stack(X).isfinite())


@torch.no_grad()
def test_strict_refuses_what_cannot_be_quantised() -> None:
    stack = Stack().double()
    options = {"quantize": "int8", "strict": True, "projections": []}
    compiled = torch.compile(stack, backend="amber_eager", options=options)
    with pytest.raises(BackendCompilerFailed, match=r"valid to quantise: torch\.float32"):
        compiled(X.double())


@torch.no_grad()
def test_a_missing_tensor_is_an_obstacle() -> None:
    stack = Stack()
    plan = plan_of(stack, INT8)
    held = plan.tensors.to_dict()
    del held["layers.0.up_proj"]["smooth"], held["layers.1.gate_proj"]["factor"]
    lacking = object.__new__(Plan)  # Plan itself refuses to be made like that
    lacking.__dict__.update({**plan.__dict__, "tensors": PlanTensors(held)})
    compiled = torch.compile(stack, backend="amber_eager", options={"plan": lacking})
    compiled(X)
    decisions = {site.name: site.decision for site in last_reports()[0].sites}
    up, gate = decisions["layers.0.up_proj"], decisions["layers.1.gate_proj"]
    assert up.unquantized == "the plan holds no tensor smooth for it"
    assert gate.reason == "the plan holds no tensor factor for it"
    assert up.unquantized_obstacle
    assert gate.obstacle


@torch.no_grad()
def test_a_reports_plan_keeps_what_was_calibrated(tmp_path) -> None:
    stack = Stack()
    plan = plan_of(stack, INT8)
    compiled = torch.compile(stack, backend="amber_eager", options={"plan": plan})
    before = compiled(X)
    last_reports()[-1].plan(how="again").save(tmp_path / "again.plan")
    torch.compiler.reset()
    options = {"plan": str(tmp_path / "again.plan"), "strict": True}
    assert torch.equal(torch.compile(stack, backend="amber_eager", options=options)(X), before)
