"""Reproducers: scripts that rebuild a graph from its report, and hold nothing else."""

import importlib.util
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from stack import Layer, Stack
from torch import Tensor, nn
from zoo import ZOO

import amber_compile
from amber_compile import Plan, Report, last_reports, register_model
from amber_compile.debug.compare import check
from amber_compile.debug.reproducer import ReproducerError, why_left_out
from amber_compile.debug.reproduction import reproduce
from amber_compile.errors import OptionError
from amber_compile.explain import explain

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"  # transformers' MoE
)

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
NUMBERS = itertools.count()
ROOT = Path(amber_compile.__file__).parents[1]


def script(folder: Path) -> dict[str, Any]:
    """Return what the script in ``folder`` defines; Dynamo imports the modules that it traces."""
    name = f"reproduce_{next(NUMBERS)}"
    spec = importlib.util.spec_from_file_location(name, folder / "reproduce.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def run(folder: Path, *, alone: bool = False) -> tuple[int, str]:
    """Run the script in a process of its own; without the packages of tests if ``alone``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    block = "import sys; sys.modules['transformers'] = None\n" if alone else ""
    (folder / "sitecustomize.py").write_text(block)  # which Python reads when it starts
    environment["PYTHONPATH"] += os.pathsep + str(folder)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "reproduce.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def rebuilt(report: Report, folder: Path) -> Report:
    """Save a report's reproducer, and return the report of what it rebuilds."""
    report.save_reproducer(folder)
    found = script(folder)
    plan = Plan.load(folder / "plan.json")
    reports = []
    for graph in found["GRAPHS"]:
        model, inputs = graph.build()
        reports.append(check(model, *inputs, plan=plan))
    return Report.merge(reports)


def sparse(report: Report) -> dict[str, str]:
    return {site.name: str(site.decision.settings) for site in report.sites if site.decision.sparse}


# ---- the failure shows again ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_a_failed_compilation_fails_again_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.lowering import lowerings

    for operator in (torch.ops.amber.nm_select, torch.ops.amber.nm_linear):
        monkeypatch.delitem(lowerings, operator.default, raising=False)  # of tests before
    broken = {"implicit_fallbacks": False, "trace.debug_dir": str(tmp_path)}
    model = torch.compile(Stack(), backend="amber", options={"inductor": broken})
    with torch.no_grad(), pytest.warns(UserWarning, match="does not compile"):
        model(X)
    report = Report.merge(last_reports())
    assert report.graphs[0].fallback
    report.save_reproducer(tmp_path)
    status, printed = run(tmp_path, alone=True)
    assert status == 1
    assert f"torch {torch.__version__}" in printed
    assert "worst sites" in printed
    assert "layers.1.down_proj" in printed
    assert "MissingOperatorWithoutDecomp" in printed
    assert "Traceback" in printed
    assert "1 of 1 graphs failed" in printed


def test_a_graph_that_works_exits_well(tmp_path: Path) -> None:
    report = check(Stack(), X)
    report.save_reproducer(tmp_path)
    status, printed = run(tmp_path, alone=True)
    assert status == 0, printed
    assert "nothing failed" in printed
    assert "amber_eager against the dense graph: relative l2 0." in printed


@pytest.mark.parametrize("value", [float("nan"), 9.0])
def test_wrong_values_fail(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(gm: Any, inputs: Any, options: Any) -> Any:
        return lambda *arguments: tuple(one * value for one in gm(*arguments))

    explain(Stack(), X).save_reproducer(tmp_path)
    torch._dynamo.register_backend(compiler_fn=wrong, name=f"wrong_{value}")
    plan = tmp_path / "plan.json"
    graphs = script(tmp_path)["GRAPHS"]
    status = reproduce(graphs, plan, f"wrong_{value}", {}, dynamic=False, tolerance=0.1)
    assert status == 1
    assert "FAILED" in capsys.readouterr().out


# ---- the same graph ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt2"])
def test_the_rebuilt_graph_has_the_sites_of_the_model(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name].build()
    report = explain(model, kwargs=inputs, device="cpu", pattern="4:8", correction=None)
    again = rebuilt(report, tmp_path)
    assert sparse(again) == sparse(report)
    shapes = {site.name: site.shape for site in report.sites}
    assert {site.name: site.shape for site in again.sites} == shapes
    assert all(0 < site.error < 1 for site in again.worst())


def test_layers_compiled_one_by_one_keep_their_names(tmp_path: Path) -> None:
    model = Stack()
    register_model(model)
    for layer in model.layers:
        layer.compile(backend="amber_eager")
    with torch.no_grad():
        model(X)
    again = rebuilt(Report.merge(last_reports()), tmp_path)
    assert set(sparse(again)) == {"layers.0.gate_proj", "layers.0.down_proj"}


def test_every_graph_of_a_broken_model_is_rebuilt(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(), Layer()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    report = explain(Broken(), X)
    assert sparse(rebuilt(report, tmp_path)) == sparse(report)
    assert len(sparse(report)) == 4


def test_a_weight_of_two_sites_becomes_two(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.down_proj = nn.Linear(64, 64), nn.Linear(64, 64)
            self.down_proj.weight = self.q_proj.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.q_proj(x).relu())

    report = explain(Twins(), X)
    assert sparse(rebuilt(report, tmp_path)) == sparse(report)
    assert set(sparse(report)) == {"q_proj", "down_proj"}


def test_symbolic_sizes_stay_symbolic(tmp_path: Path) -> None:
    class Flat(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(x.shape[0] * x.shape[1], 64)

    explain(Flat(), X, dynamic=True).save_reproducer(tmp_path)
    found = script(tmp_path)
    assert found["DYNAMIC"] is True
    model, _ = found["GRAPHS"][0].build()
    assert model(torch.randn(3, 5, 64))[0].shape == (15, 64)


def test_inputs_have_their_layout_and_small_values(tmp_path: Path) -> None:
    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.down_proj = nn.Embedding(5, 64), nn.Linear(64, 32)

        def forward(self, ids: Tensor, x: Tensor, half: Tensor, mask: Tensor) -> Tensor:
            x = self.embedding(ids) + x.transpose(-1, -2).reshape(2, 8, 64) + half.float()
            return self.down_proj(x.where(mask, 0))

    given = (
        torch.full((2, 8), 4),
        torch.randn(2, 8, 64).transpose(-1, -2),
        torch.randn(2, 1, 64, dtype=torch.bfloat16),
        torch.ones(8, 1, dtype=torch.bool).expand(2, 8, 64),
    )
    explain(Taking(), *given).save_reproducer(tmp_path)
    _, inputs = script(tmp_path)["GRAPHS"][0].build()
    assert [(one.shape, one.stride(), one.dtype) for one in inputs] == [
        (one.shape, one.stride(), one.dtype) for one in given
    ]
    assert set(inputs[0].unique().tolist()) <= {0, 1}
    assert 0 < inputs[3].float().mean() < 1


def test_long_arguments_are_written_out(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down_proj(x)
            return torch.cat([y + at for at in range(100)], -1)

    report = explain(Wide(), X)
    assert sparse(rebuilt(report, tmp_path)) == sparse(report) != {}


# ---- nothing private -----------------------------------------------------------------------------


def test_nothing_private_is_written(tmp_path: Path) -> None:
    class Secretive(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)  # a comment of the user

    report = check(
        Secretive(),
        X,
        inductor={"trace.debug_dir": str(tmp_path), "epilogue_fusion": False},
    )
    report.save_reproducer(tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [one.name for one in files] == ["plan.json", "reproduce.py"]
    text = "".join(one.read_text() for one in files)
    for private in (
        str(tmp_path),
        str(Path.home()),
        str(ROOT),
        "site-packages",
        os.uname().nodename,
    ):
        assert private not in text
    for line in ("super().forward", "a comment of the user", "down_proj(self.gate_proj"):
        assert line not in text
    assert "'epilogue_fusion': False" in text
    assert "no plain values: trace.debug_dir" in text
    assert max(map(len, text.split())) < 100  # no data


def test_a_report_keeps_no_tensor_alive() -> None:
    stack, x = Stack(), X.clone()
    report = explain(stack, x)
    with torch.no_grad():
        torch.compile(stack, backend="amber_eager")(x)
    assert report.graphs[0].traced
    assert last_reports()[0].graphs[0].traced
    held = [weakref.ref(one) for one in (x, *stack.parameters())]
    del stack, x
    torch._dynamo.reset()
    assert [one() for one in held] == [None] * len(held)


# ---- what cannot be rebuilt ----------------------------------------------------------------------


def test_graphs_that_no_script_can_have_are_named_with_the_reason(tmp_path: Path) -> None:
    class Nested(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=False)

    report = explain(Nested(), X)
    with pytest.raises(ReproducerError, match=r"no graph .* graph 0: it holds .* a nested graph"):
        report.save_reproducer(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_operators_of_other_libraries_are_named(tmp_path: Path) -> None:
    model, inputs = ZOO["mixtral"].build()
    with pytest.raises(ReproducerError, match=r"transformers.grouped_mm_fallback, an operator of"):
        explain(model, kwargs=inputs, device="cpu").save_reproducer(tmp_path)


def test_dense_graphs_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    model = torch.compile(Stack(), backend="amber_eager", dynamic=False)
    with torch.no_grad():
        model(X)
        model(X[:, :1])
    report = Report.merge(last_reports())
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    assert why_left_out(report.graphs[1]) == "nothing in it was to be sparse"
    report.save_reproducer(tmp_path)
    assert (
        "Left out: graph 1: nothing in it was to be sparse"
        in (tmp_path / "reproduce.py").read_text()
    )
    assert len(script(tmp_path)["GRAPHS"]) == 1


def test_the_backend_may_be_chosen(tmp_path: Path) -> None:
    report = explain(Stack(), X)
    for backend, expected in ((None, "amber_eager"), ("amber", "amber")):
        report.save_reproducer(tmp_path, backend=backend)
        assert script(tmp_path)["BACKEND"] == expected
    with pytest.raises(OptionError, match="unknown backend 'inductor'; valid: amber, amber_eager"):
        report.save_reproducer(tmp_path, backend="inductor")


def test_an_empty_report_has_nothing_to_rebuild(tmp_path: Path) -> None:
    with pytest.raises(ReproducerError, match="it has none"):
        Report().save_reproducer(tmp_path)
