"""Explaining a model: every linear once with a true reason, and nothing changed by looking."""

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stack import Layer, Stack
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import graph_break_reasons
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from amber_compile import Plan, Report, last_reports, register_model
from amber_compile.errors import OptionError, PlanError, RewriteError
from amber_compile.explain import explain
from amber_compile.naming import full_name
from amber_compile.outside import NOT_CALLED
from amber_compile.report import GraphReport

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
META = torch.empty(2, 8, 64, device="meta")


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def reasons(report: Report) -> dict[str, str | None]:
    return {site.name: site.decision.reason for site in report.sites}


# ---- what no graph holds -------------------------------------------------------------------------


class Broken(nn.Module):
    """Two layers with a break in each, a linear that Python runs, and one that nobody calls."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(64, 64)
            self.down_proj = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.q_proj(x)
            torch._dynamo.graph_break()
            return self.down_proj(x)

    class Eager(Layer):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Inner(), self.Inner()
        self.eager = self.Eager()
        self.spare = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.eager(self.second(self.first(x)))


class Unused(nn.Module):
    """A linear that runs, one that does not, and one whose weight is read in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)
        self.spare = nn.Linear(64, 32)
        self.scale = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.scale.weight.sum()


@pytest.mark.parametrize("build", [Broken, lambda: on_meta(Broken)])
def test_linears_outside_every_graph_are_listed_with_that_reason(build: Any) -> None:
    report = explain(build(), X)
    found = reasons(report)
    assert len(found) == len(report.sites) == 8
    for name in ("first.q_proj", "first.down_proj", "second.q_proj", "second.down_proj"):
        assert found[name] is None
    outside = {site.name for site in report.outside}
    assert outside == {"eager.gate_proj", "eager.up_proj", "eager.down_proj", "spare"}
    for name in outside:
        assert found[name] == (
            "no graph reads its weight: it runs at a graph break, or is not called"
        )
    dense = 3 * 64 * 96 + 64 * 64  # what may run counts
    assert report.coverage == pytest.approx(4 * 64 * 64 / (4 * 64 * 64 + dense))


@pytest.mark.parametrize("build", [Unused, lambda: on_meta(Unused)])
def test_a_linear_that_is_not_called_says_so_and_counts_nothing(build: Any) -> None:
    report = explain(build(), X)
    found = reasons(report)
    assert found == {
        "q_proj": None,
        "spare": NOT_CALLED,
        "scale": "a graph reads its weight, and in no multiplication that is recognised",
    }
    assert {site.name: site.macs for site in report.sites}["spare"] == 0


def test_nothing_is_outside_a_model_that_is_one_graph() -> None:
    assert explain(Stack(), X).outside == []


class Lora(nn.Module):
    """LoRA's shape: the projection is called by the name of what wraps it."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x)

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = self.Wrapped()
        self.k_proj = nn.Linear(64, 64)
        self.same = self.k_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.same(x)


def test_wrapped_and_shared_modules_are_listed_once() -> None:
    assert len(explain(Lora(), X).sites) == 2


# ---- graph breaks --------------------------------------------------------------------------------


def test_breaks_name_the_users_line_once() -> None:
    report = explain(Broken(), X)
    first, *others = report.breaks
    assert first.file == __file__
    assert first.code == "torch._dynamo.graph_break()"
    assert first.function == "forward"
    assert first.where.startswith(f"{__file__}:{first.line} in forward: ")
    assert "graph_break" in first.reason
    assert "\n" not in first.reason
    assert len(first.details) > len(first.reason)
    assert [one.code for one in others] == ["return self.eager(self.second(self.first(x)))"]
    assert "; 2 graph breaks" in report.summary()
    assert first.where in str(report)
    assert any(graph.broken == first for graph in report.graphs)


def test_a_model_without_breaks_says_so() -> None:
    report = explain(Stack(), X)
    assert report.breaks == []
    assert report.summary().endswith("graphs: 1 prefill; no graph breaks")
    assert "\ngraph breaks\n" not in str(report)


def test_a_run_knows_the_break_that_ended_each_graph() -> None:
    with torch.no_grad():
        torch.compile(Broken(), backend="amber_eager")(X)
    report = Report.merge(last_reports())
    assert report.breaks[0].code == "torch._dynamo.graph_break()"
    with torch.no_grad():
        torch.compile(Stack(), backend="amber_eager")(X)
    assert last_reports()[-1].breaks == []
    assert "graph break" not in last_reports()[-1].summary()


# ---- inputs and options --------------------------------------------------------------------------


def test_it_says_what_a_compilation_says() -> None:
    model = Stack()
    options = {"pattern": "8:16", "score": "magnitude", "skip": ["*.down_proj"]}
    explained = explain(model, X, **options)
    with torch.no_grad():
        torch.compile(model, backend="amber_eager", options=options)(X)
    (compiled,) = last_reports()
    assert explained.sites == compiled.sites
    assert explained.graphs[0].rewritten == compiled.graphs[0].rewritten == 2
    assert (explained.coverage, explained.removed) == (compiled.coverage, compiled.removed)
    stages = [[stage.name for stage in one.graphs[0].stages] for one in (explained, compiled)]
    assert stages[0] == stages[1]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, pattern: int = 0) -> Tensor:
        x = self.q_proj(x)
        return x if mask is None else x * mask


def test_keyword_inputs_are_apart_from_options() -> None:
    inputs = {"mask": torch.ones(64), "pattern": 3}
    assert explain(Masked(), X, kwargs=inputs, pattern="4:8").coverage == 1


def test_a_keyword_input_among_the_options_is_an_error_that_says_where_it_goes() -> None:
    with pytest.raises(OptionError, match=r"mask= is an input of the model.*kwargs=\{'mask': "):
        explain(Masked(), X, mask=torch.ones(64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patern": "2:4"}, OptionError, "unknown option 'patern'; did you mean 'pattern'"),
        ({"pattern": "5:4"}, OptionError, "is not an N:M pattern"),
        ({"device": "tpu"}, OptionError, "unknown device 'tpu'"),
        ({"plan": Plan({}, {})}, PlanError, "plan"),
    ],
)
def test_bad_options_are_errors(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explain(Stack(), X, **options)
    assert not graph_break_reasons


def test_strict_is_an_error_here_too() -> None:
    with pytest.raises(RewriteError, match="is not a multiple of M"):
        explain(nn.Sequential(nn.Linear(6, 4)), torch.ones(2, 3, 6), projections="*", strict=True)


def test_what_is_no_module_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"explain takes a torch\.nn\.Module, not function"):
        explain(lambda x: x, X)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("shape", "phase"), [((1, 8, 64), "prefill"), ((4, 1, 64), "decode"), ((8, 64), "unknown")]
)
def test_the_phase_follows_the_inputs(shape: tuple[int, ...], phase: str) -> None:
    assert [graph.phase for graph in explain(Stack(), torch.ones(shape)).graphs] == [phase]


def test_sizes_are_static_unless_asked_for() -> None:
    few = {"min_tokens": 1000}
    for shape in ((1, 8, 64), (1, 9, 64)):  # a second shape is not the dynamic one it would be
        assert explain(Stack(), torch.ones(shape), **few).coverage == 0
    report = explain(Stack(), X, dynamic=True, **few)
    assert report.coverage > 0  # compared at run time
    assert len(report.graphs) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda", torch.device("cuda", 0)])
@pytest.mark.parametrize("build", [Stack, lambda: on_meta(Stack)])
def test_any_model_is_explained_for_any_device(build: Any, device: Any) -> None:
    report = explain(build(), X, device=device)
    assert report.coverage > 0
    assert f"explained for {torch.device(device).type}, " in report.explained


def test_the_device_is_the_models_own_or_that_of_prefill() -> None:
    assert explain(Stack(), X).explained.startswith("explained for cpu, with its weights")
    assert explain(on_meta(Stack), META).explained.startswith("explained for cuda, from shapes")
    with FakeTensorMode():
        fake = Stack()
    assert "weights hold no values" in explain(fake, X).explained


def test_a_weight_that_is_not_finite_is_found_where_there_are_values() -> None:
    model = Stack()
    with torch.no_grad():
        model.layers[0].gate_proj.weight[0, 0] = torch.inf
    assert "not finite" in str(reasons(explain(model, X))["layers.0.gate_proj"])
    assert reasons(explain(model.to("meta"), X))["layers.0.gate_proj"] is None


# ---- nothing is changed by looking ---------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls in a buffer, and in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.seen += 1
        return self.q_proj(x)


def test_a_model_of_one_graph_does_not_run() -> None:
    model = Counting()
    before = dict(model.state_dict(keep_vars=True))
    explain(model, X)
    assert (model.calls.item(), model.seen) == (0, 0)
    after = dict(model.state_dict(keep_vars=True))
    assert all(after[name] is value for name, value in before.items())
    assert model.training
    assert torch.is_grad_enabled()


def test_reports_and_records_of_runs_stay() -> None:
    with torch.no_grad():
        torch.compile(Broken(), backend="amber_eager")(X)
    reports, breaks = last_reports(), list(graph_break_reasons)
    explain(Broken(), X)
    assert last_reports() == reports
    assert graph_break_reasons == breaks


@torch.no_grad()
@pytest.mark.parametrize("build", [Stack, Broken])
def test_compiled_code_stays_and_stays_usable(build: Any) -> None:
    model, counter = build(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    expected = compiled(X)
    graphs = counter.frame_count
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):  # more often than Dynamo would recompile
            assert explain(model, X).coverage > 0
    assert torch.equal(compiled(X), expected)
    assert counter.frame_count == graphs
    compiled(X[:1])
    assert counter.frame_count == 2 * graphs  # and learnt no size


def test_no_graph_and_no_model_is_held_on_to() -> None:
    def held() -> list[object]:
        gc.collect()
        kept = (GraphModule, GraphReport, Broken)
        return [one for one in gc.get_objects() if issubclass(type(one), kept)]

    before = len(held())
    explain(Broken(), X)
    explain(Stack(), X)
    assert len(held()) == before


@torch.no_grad()
def test_a_model_is_compiled_after_as_before() -> None:
    model = Broken()
    explain(model, X)
    explain(model, X[:1])
    counter = CompileCounter()
    torch.compile(model, backend=counter)(X)
    fresh = CompileCounter()
    torch._dynamo.reset()
    torch.compile(Broken(), backend=fresh)(X)
    assert counter.frame_count == fresh.frame_count


def compiled_whole() -> nn.Module:
    return torch.compile(Stack(), backend="amber_eager")


def compiled_in_place() -> nn.Module:
    model = Stack()
    model.compile(backend="amber_eager")
    return model


def compiled_layers() -> nn.Module:
    model = Stack()
    for layer in model.layers:
        layer.compile(backend="amber_eager")
    return model


def replaced_layers() -> nn.Module:
    model = Stack()
    for at, layer in enumerate(model.layers):
        model.layers[at] = torch.compile(layer, backend="amber_eager")
    return model


@pytest.mark.parametrize(
    "build", [compiled_whole, compiled_in_place, compiled_layers, replaced_layers]
)
def test_a_compiled_model_is_explained_as_if_it_were_not(build: Callable[[], nn.Module]) -> None:
    report = explain(build(), X)
    assert [site.name for site in report.sites] == [site.name for site in explain(Stack(), X).sites]
    assert len(report.graphs) == 1
    assert last_reports() == []


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_that_keeps_dynamo_away_is_suspended(stance: str) -> None:
    with torch.compiler.set_stance(stance):
        assert explain(Stack(), X).coverage > 0
    with torch._dynamo.config.patch(disable=True, suppress_errors=True):
        assert explain(Stack(), X).coverage > 0


def test_names_that_were_registered_come_back() -> None:
    model = Broken()
    outer = nn.ModuleDict({"model": model})
    register_model(outer)
    assert "first.q_proj" in reasons(explain(model, X))
    assert full_name("q_proj", model.first.q_proj.weight) == "model.first.q_proj"
    unregistered = Broken()
    explain(unregistered, X)
    assert full_name("q_proj", unregistered.first.q_proj.weight) == "q_proj"


def test_an_error_of_the_model_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="size"):
        explain(Stack(), torch.ones(2, 8, 63))
    assert explain(Stack(), X).coverage > 0


# ---- what is printed -----------------------------------------------------------------------------


def test_the_report_as_json_is_plain() -> None:
    data = json.loads(json.dumps(explain(Broken(), X).to_json(), allow_nan=False))
    assert data["breaks"][0]["code"] == "torch._dynamo.graph_break()"
    assert data["graphs"][0]["broken"] == data["breaks"][0]
    assert data["explained"].startswith("explained for cpu")
    assert len(data["sites"]) == 8


def test_merged_explanations_list_a_linear_once() -> None:
    model = Unused()
    both = Report.merge([explain(model, X), explain(model, X[:, :1])])
    assert [graph.phase for graph in both.graphs] == ["prefill", "decode"]
    assert sorted(site.name for site in both.sites) == ["q_proj", "scale", "spare"]
    assert both.explained


# ---- a GPU that is not here ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [
        ((9, 0), "nm_linear, wgmma.sp from 1024 tokens"),
        ((8, 0), "nm_linear, mma.sp from 1024 tokens"),
        ((7, 5), "nm_select, Triton; no sparse kernel for compute capability 7.5"),
    ],
)
def test_a_gpu_is_named_by_its_compute_capability(capability: Any, kernel: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 8192, bias=False, dtype=torch.bfloat16))
        x = torch.empty(2048, 4096, dtype=torch.bfloat16)
    report = explain(model, x, capability=capability, projections=["*"])
    assert [site.kernel for site in report.sites] == [kernel]
    assert f"explained for cuda {capability[0]}.{capability[1]}, " in str(report)


@pytest.mark.parametrize(
    "wrong", [{"capability": 9.0}, {"capability": (9, 0), "device": "cpu"}, {"capability": (9,)}]
)
def test_a_capability_is_two_numbers_of_a_gpu(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"capability=.*valid: two whole numbers"):
        explain(nn.Linear(4, 4), torch.zeros(1, 4), **wrong)
