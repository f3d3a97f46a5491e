"""What rewrite() takes, refuses, and remembers."""

import pytest
import torch
from programs_of import X, exported, plan_of
from stack import Stack
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from amber_compile import AmberConfig, last_reports, rewrite
from amber_compile.errors import OptionError, PlanError, RewriteError

PROGRAMS = {
    "exported": lambda model: (exported(model), None),
    "symbolic_trace": lambda model: (symbolic_trace(model), (X,)),
}


@pytest.fixture(params=PROGRAMS.values(), ids=PROGRAMS)
def given(request):
    """Return the arguments that a program of a model is rewritten with."""

    def make(model: nn.Module):
        program, inputs = request.param(model)
        return program, {"example_inputs": inputs}

    return make


@pytest.mark.parametrize("program", [Stack(), None, torch.ones(1), "model", Stack().forward])
def test_other_programs_are_refused(program):
    with pytest.raises(
        OptionError, match=rf"program is a {type(program).__name__}; valid: .*Graph"
    ):
        rewrite(program)


@pytest.mark.parametrize("config", [{"pattern": "2:4"}, "2:4", AmberConfig])
def test_a_config_is_an_amber_config(given, config):
    program, inputs = given(Stack())
    with pytest.raises(OptionError, match="valid: an AmberConfig, or None"):
        rewrite(program, config, **inputs)


OF_THE_BACKEND = {
    "check": {"check": True},
    "decode": {"quantize": "int8", "decode": "int8"},
    "mode": {"mode": "max-autotune"},
    "inductor": {"inductor": {"max_autotune": True}},
}


@pytest.mark.parametrize("name", OF_THE_BACKEND)
def test_what_only_the_backend_has_is_refused(given, name):
    program, inputs = given(Stack())
    with pytest.raises(OptionError, match=f"^{name}=.* is for backend='amber' only"):
        rewrite(program, AmberConfig(**OF_THE_BACKEND[name]), **inputs)


def test_without_a_config_it_is_the_default(given):
    program, inputs = given(Stack())
    one, report = rewrite(program, **inputs)
    other, _ = rewrite(program, AmberConfig(), **inputs)
    assert str(one.graph) == str(other.graph)
    assert report.graphs[0].rewritten == 4
    kind = torch.export.ExportedProgram if inputs["example_inputs"] is None else GraphModule
    assert isinstance(one, kind)


def test_the_report_is_remembered(given):
    program, inputs = given(Stack())
    _, report = rewrite(program, **inputs)
    assert last_reports() == [report]
    stages = [stage.name for stage in report.graphs[0].stages]
    assert stages == ["traced", "sparsify_projections"]
    assert "2:4" in str(report)


def test_strict_names_what_cannot_be_rewritten(given):
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Parameter(torch.randn(8, 64))

        def forward(self, x):
            return self.q_proj @ x.transpose(1, 2)

    program, inputs = given(Left())
    _, report = rewrite(program, AmberConfig(projections="*"), **inputs)
    assert "left operand" in str(report.sites[0].decision.reason)
    with pytest.raises(RewriteError, match="q_proj: its weight is the left operand"):
        rewrite(program, AmberConfig(projections="*", strict=True), **inputs)


def test_a_plan_decides(given):
    stack = Stack()
    plan = plan_of(stack, smooth=False)
    program, inputs = given(stack)
    _, report = rewrite(program, AmberConfig(plan=plan), **inputs)
    assert [site.decision.sparse for site in report.sites] == [True, False, True] * 2
    assert report.graphs[0].plan is plan


def test_the_plan_of_another_model_is_refused(given):
    model = nn.Sequential(nn.Linear(64, 64))
    program, inputs = given(model)
    with pytest.raises(PlanError, match="belongs to another model"):
        rewrite(program, AmberConfig(plan=plan_of(Stack())), **inputs)


def test_a_program_without_projections_comes_back(given):
    program, inputs = given(nn.Sequential(nn.ReLU()))
    done, report = rewrite(program, AmberConfig(strict=True), **inputs)
    assert report.sites == []
    assert str(done.graph) == str(program.graph)
