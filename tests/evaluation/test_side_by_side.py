"""One model, dense and sparse: the same as compiled, and nothing left behind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stack import Layer, Stack
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.testing import CompileCounter

from amber_compile import last_reports
from amber_compile.errors import OptionError
from amber_compile.evaluation.side_by_side import Sparse, config_of, sides
from amber_compile.stand_in import released

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


def called(model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the dense and the sparse output."""
    with sides(model, {"a": config_of(options)}) as (dense, sparse):
        return dense(x=X), sparse["a"](x=X)


def compiled(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return torch.compile(model, backend="amber_eager", options=options)(X)


def test_dense_is_the_model_and_sparse_the_compiled_model_bit_for_bit() -> None:
    stack = Stack()
    dense, sparse = called(stack, pattern="8:16")
    with torch.no_grad():
        assert torch.equal(dense, stack(X))
    assert torch.equal(sparse, compiled(stack, pattern="8:16"))
    assert not torch.equal(dense, sparse)


def test_cases_do_not_mix() -> None:
    stack = Stack()
    cases = {"2:4": {"pattern": "2:4"}, "8:16": {"pattern": "8:16"}, "none": {"skip": ["*"]}}
    configs = {name: config_of(options) for name, options in cases.items()}
    with sides(stack, configs) as (dense, sparse):
        found = {name: run(x=X) for name, run in sparse.items()}
        again = {name: run(x=X) for name, run in sparse.items()}
        reports = {name: run.report for name, run in sparse.items()}
        expected = dense(x=X)
    for name, options in cases.items():
        assert torch.equal(found[name], again[name])
        assert torch.equal(found[name], compiled(stack, **options))
    assert torch.equal(found["none"], expected)
    patterns = {
        name: {str(site.decision.settings.pattern) for site in report.sites if site.decision.sparse}
        for name, report in reports.items()
    }
    assert patterns == {"2:4": {"2:4"}, "8:16": {"8:16"}, "none": set()}
    assert {name: len(report.graphs) for name, report in reports.items()} == dict.fromkeys(cases, 1)


def test_the_report_has_every_linear_of_the_model() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = Stack()
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.stack(x)

    with sides(Half(), {"a": config_of({})}) as (_, sparse):
        sparse["a"](x=X)
        sites = sparse["a"].report.sites
    assert len(sites) == 7
    assert sites[-1].name == "unused"


def test_what_inductor_generates(inductor: None) -> None:
    class Root(nn.Module):  # nothing between its operators to generate C++ for: that takes seconds
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(x)

    model = Root()
    with sides(model, {"a": config_of({})}, backend="amber") as (_, sparse):
        found = sparse["a"](x=X)
        assert sparse["a"].report.graphs[0].code_files
    assert torch.equal(found, compiled(model))


class Broken(nn.Module):
    """Two layers with a graph break behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def test_graphs_behind_a_break_are_sparse_too() -> None:
    dense, sparse = called(Broken())
    with torch.no_grad():
        assert torch.equal(dense, Stack()(X))
    assert torch.equal(sparse, compiled(Stack()))


def test_one_graph_for_every_size_where_asked_for() -> None:
    stack = Stack()
    expected = compiled(stack)
    with sides(stack, {"a": config_of({})}, dynamic=True) as (_, sparse):
        for size in (3, 5, 8):
            assert torch.equal(sparse["a"](x=X[:, :size].clone()), expected[:, :size])
        assert len(sparse["a"].report.graphs) == 1


# ---- nothing changes -----------------------------------------------------------------------------


def test_the_process_stays_as_it_was() -> None:
    model, counter = Stack(), CompileCounter()
    own = torch.compile(model, backend=counter)
    with torch.no_grad():
        own(X)
    versions = [one._version for one in model.parameters()]
    called(own)
    assert last_reports() == []
    assert [one._version for one in model.parameters()] == versions
    with torch.no_grad():
        own(X)
    assert counter.frame_count == 1


def test_what_was_compiled_behind_a_break_is_forgotten() -> None:
    def alive() -> int:
        entries = _debug_get_cache_entry_list(Layer.forward.__code__)
        return sum(type(one.guard_manager) is not DeletedGuardManagerWrapper for one in entries)

    with sides(Broken(), {"a": config_of({})}) as (_, sparse):
        sparse["a"](x=X)
        assert alive() == 1
    assert alive() == 0


def test_dropout_is_off_inside_and_afterwards_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(), Stack(), nn.Dropout())
    model[2].eval()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    dense, _ = called(Named())
    with torch.no_grad():
        assert torch.equal(dense, model[1](X))
    assert [part.training for part in model] == [True, True, False]


def test_a_failure_leaves_nothing_behind() -> None:
    model = Stack().train()

    def fail() -> Iterator[Sparse]:
        with sides(model, {"a": config_of({})}) as (_, sparse):
            yield sparse["a"]

    for run in fail():
        with pytest.raises(TypeError, match="unknown"):
            run(unknown=X)
    assert model.training
    assert last_reports() == []


# ---- mistakes ------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not function"):
        called(lambda x: x)  # type: ignore[arg-type]  # on purpose
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(OptionError, match="weights hold no values"):
        called(model)
    with pytest.raises(OptionError, match=r"did you mean 'pattern'"):
        called(Stack(), patern="2:4")
    with (
        pytest.raises(OptionError, match=r"unknown backend 'inductor'; .*amber_eager"),
        sides(Stack(), {}, backend="inductor"),
    ):
        pass


def test_no_weight_is_released() -> None:
    model = Stack()
    dense, sparse = called(model, quantize="int8", decode="int8")
    assert not torch.equal(dense, sparse)
    assert not released(model)
    with torch.no_grad():
        assert torch.equal(model(X), dense)
