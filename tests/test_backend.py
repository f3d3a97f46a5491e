"""What the backend takes, what it refuses, and what becomes of a graph that it cannot rewrite."""

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from stack import Stack, sparse
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from amber_compile import AmberConfig, Plan, backend, last_reports
from amber_compile.backend import amber_eager, compile_graph
from amber_compile.binding import Compiled
from amber_compile.inductor import inductor_patches
from amber_compile.plan import PlannedSite

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


class Projection(nn.Module):
    """One projection under the name of one that the rule sparsifies."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.q_proj = nn.Linear(channels, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


@torch.no_grad()
def run(model: nn.Module, x: Tensor = X, **options: object) -> Tensor:
    """Return what ``model`` computes through ``amber_eager``, without a correction."""
    options = {"correction": None} | options
    return torch.compile(model, backend="amber_eager", options=options)(x)


def reasons() -> dict[str, str | None]:
    return {site.name: site.decision.reason for site in last_reports()[-1].sites}


# ---- options ----


def test_backends_are_entry_points() -> None:
    found = {point.name: point.value for point in entry_points(group="torch_dynamo_backends")}
    assert found["amber"] == "amber_compile.backend:amber"
    assert found["amber_eager"] == "amber_compile.backend:amber_eager"


@pytest.mark.parametrize("name", ["amber", "amber_eager"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patern": "2:4"}, "unknown option 'patern'; did you mean 'pattern'"),
        ({"pattern": "2-4"}, "pattern='2-4' is malformed; write it as 'N:M'"),
        ({"pattern": "5:4"}, "5:4 is not an N:M pattern; valid: 1 <= N <= M"),
        ({"score": "robust"}, "unknown score 'robust'; did you mean 'robust_norm'"),
        ({"strict": 1}, "strict=1 must be True or False"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"plan": "/nowhere/llama.plan"}, "plan file '/nowhere/llama.plan' cannot be read"),
        ({"inductor": ["max_autotune"]}, "must be a dict of config patches"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_named_by_torch_compile(
    name: str, options: Mapping[str, object], message: str
) -> None:
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(Projection(), backend=name, options=options)(X)
    assert message in str(raised.value)


def test_an_unknown_mode_is_named_by_torch_compile() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"unknown mode 'fast'; .* max-autotune"):
        torch.compile(Projection(), backend="amber_eager", mode="fast")(X)


def test_an_unknown_inductor_entry_is_refused_even_where_nothing_is_rewritten() -> None:
    options = {"inductor": {"max_autotun": True}, "skip": ["*"]}
    message = "unknown Inductor option 'max_autotun'; did you mean 'max_autotune'"
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(Projection(), backend="amber", options=options)(X)


def test_mode_and_inductor_entries_reach_inductor_the_latter_last() -> None:
    assert inductor_patches(AmberConfig()) == {}
    config = AmberConfig(mode="max-autotune-no-cudagraphs", inductor={"max_autotune": False})
    patches = inductor_patches(config)
    assert patches["coordinate_descent_tuning"] is True
    assert patches["max_autotune"] is False


@torch.no_grad()
def test_mode_may_be_given_on_its_own_or_among_the_options(
    inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compile_fx(gm: GraphModule, inputs: Sequence[Any], config_patches: object) -> Compiled:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compile(Projection(), backend="amber", mode="reduce-overhead")(X)
    torch._dynamo.reset()
    torch.compile(Projection(), backend="amber", options={"mode": "reduce-overhead"})(X)
    assert seen == [{"triton.cudagraphs": True}] * 2


def test_a_plan_of_another_model_is_refused() -> None:
    plan = Plan({"q_proj": PlannedSite((32, 128), "dense")})
    message = r"another model: .*q_proj \[32, 64\] \(plan: \[32, 128\]\)"
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(Projection(), backend="amber_eager", options={"plan": plan})(X)


# ---- what stays dense ----


def test_channels_that_the_pattern_does_not_divide_stay_dense() -> None:
    model = Projection(channels=66)
    x = torch.randn(2, 8, 66)
    assert torch.equal(run(model, x), model(x))
    assert reasons() == {"q_proj": "K = 66 is not a multiple of M = 4"}


def test_a_weight_that_is_not_floating_point_stays_dense() -> None:
    class Integer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Parameter(torch.randint(-8, 8, (32, 64)), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.q_proj.to(x.dtype))

    model = Integer()
    assert torch.equal(run(model), model(X))
    assert "dtype torch.float32 x torch.int64" in str(reasons()["q_proj"])


def test_a_quantised_weight_in_a_buffer_stays_dense_and_is_listed() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q_proj", torch.randint(-8, 8, (32, 64), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.q_proj.to(x.dtype))

    run(Quantised())
    assert "dtype torch.float32 x torch.int8" in str(reasons()["q_proj"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_stays_dense_and_its_neighbours_do_not(value: float) -> None:
    stack = Stack()
    with torch.no_grad():
        stack.layers[0].down_proj.weight[0, 5] = value
    result = run(stack)
    expected = sparse(stack, X, dense=["layers.0.down_proj"])
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert "not finite in 1 of 96 input channels" in str(reasons()["layers.0.down_proj"])
    assert reasons()["layers.1.down_proj"] is None


def test_a_meta_model_stays_meta() -> None:
    assert run(Projection().to("meta"), X.to("meta")).is_meta
    assert reasons() == {"q_proj": "its weight is a meta tensor and holds no values"}


def test_an_adapter_stays_dense_beside_its_sparse_base_layer() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(64, 32)
            self.lora_A = nn.Linear(64, 4)
            self.lora_B = nn.Linear(4, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    model = Projection()
    model.q_proj = Adapted()
    run(model)
    dense = {name for name, reason in reasons().items() if reason}
    assert dense == {"q_proj.lora_A", "q_proj.lora_B"}
    assert reasons()["q_proj"] is None


def test_a_graph_without_projections_runs() -> None:
    assert torch.equal(run(nn.ReLU()), X.relu())
    assert last_reports()[0].coverage == 0


def test_a_graph_that_needs_gradients_stays_dense_and_trains() -> None:
    model = Projection()
    compiled = torch.compile(model, backend="amber_eager")
    with pytest.warns(UserWarning, match="needs gradients, so it stays dense"):
        compiled(X).sum().backward()
    expected = torch.autograd.grad(model(X).sum(), model.q_proj.weight)[0]
    assert torch.equal(model.q_proj.weight.grad, expected)
    assert "the graph needs gradients" in str(reasons()["q_proj"])


def test_a_frozen_model_is_sparse_in_grad_mode() -> None:
    stack = Stack().requires_grad_(False)
    result = torch.compile(stack, backend="amber_eager", options={"correction": None})(X)
    assert torch.equal(result, sparse(stack, X))


@pytest.mark.parametrize(
    ("channels", "grad", "reason"),
    [(66, False, "K = 66 is not a multiple"), (64, True, "the graph needs gradients")],
)
def test_strict_refuses_what_was_planned_and_cannot_be(
    channels: int, grad: bool, reason: str
) -> None:
    strict = torch.compile(Projection(channels), backend="amber_eager", options={"strict": True})
    with torch.set_grad_enabled(grad), pytest.raises(BackendCompilerFailed) as raised:
        strict(torch.randn(2, 8, channels))
    assert "strict=True, and 1 planned projections cannot be" in str(raised.value)
    assert f"q_proj: {reason}" in str(raised.value)


def test_strict_accepts_what_was_planned_dense() -> None:
    run(Stack(), strict=True)
    run(Stack(), X[:, :1], strict=True)  # decode
    assert len(last_reports()) == 2


# ---- a compiler that fails ----


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the inner compiler fail for graphs that hold Amber's operators."""
    real = backend._run_eagerly

    def compile_or_fail(
        gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
    ) -> Compiled:
        if rewritten:
            raise ZeroDivisionError("no such kernel")
        return real(gm, inputs, config, rewritten)

    monkeypatch.setattr(backend, "_run_eagerly", compile_or_fail)


@pytest.mark.usefixtures("failing")
def test_a_graph_that_does_not_compile_runs_dense_with_one_warning() -> None:
    stack = Stack()
    with pytest.warns(UserWarning, match="so the dense one runs") as warned:
        assert torch.equal(run(stack), stack(X))
    assert len(warned) == 1
    assert "ZeroDivisionError: no such kernel" in str(warned[0].message)
    report = last_reports()[0]
    assert report.coverage == 0
    assert report.graphs[0].rewritten == 0
    assert report.graphs[0].fallback == "ZeroDivisionError: no such kernel"
    assert "no such kernel" in str(reasons()["layers.0.gate_proj"])
    assert "rule" in str(reasons()["layers.0.up_proj"])


@pytest.mark.usefixtures("failing")
def test_a_graph_that_does_not_compile_is_an_error_under_strict() -> None:
    with pytest.raises(BackendCompilerFailed, match="does not compile: no such kernel"):
        run(Stack(), strict=True)


# ---- Dynamo's graph ----


@torch.no_grad()
def test_dynamos_graph_is_left_as_it_was() -> None:
    def spy(gm: GraphModule, inputs: list[Any]) -> Compiled:
        before = gm.code, [dict(node.meta) for node in gm.graph.nodes]
        compiled = amber_eager(gm, inputs)
        assert before == (gm.code, [dict(node.meta) for node in gm.graph.nodes])
        assert last_reports()[0].coverage > 0
        return compiled

    torch.compile(Stack(), backend=spy)(X)


@torch.no_grad()
def test_a_graph_with_nothing_to_sparsify_goes_to_the_compiler_as_it_came() -> None:
    given: list[GraphModule] = []

    def inner(
        gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
    ) -> Compiled:
        assert not rewritten
        given.append(gm)
        return gm.forward

    def spy(gm: GraphModule, inputs: list[Any]) -> Compiled:
        compiled = compile_graph(gm, inputs, AmberConfig(), inner)
        assert given == [gm]
        assert compiled == gm.forward  # nothing stands between Dynamo and what was compiled
        return compiled

    torch.compile(Stack(), backend=spy)(X[:, :1])


def test_each_compiled_graph_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="amber_compile"):
        run(Stack())
    lines = [record.message for record in caplog.records if record.name == "amber_compile"]
    assert lines == [last_reports()[0].summary()]
    assert lines[0].startswith("4 of 6 projections sparse")
