"""``check``: the errors of a model by site, graph and output, and nothing changed by measuring."""

import copy
import math
from typing import Any

import pytest
import torch
from stack import Layer, Stack, sparse
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache
from zoo import ZOO

from amber_compile import Report, last_reports
from amber_compile.debug.compare import check
from amber_compile.debug.output_error import OutputError, output_error
from amber_compile.decision import dense
from amber_compile.errors import OptionError, RewriteError
from amber_compile.report import GraphReport, Site

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"  # transformers' MoE
)

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
PLAIN: dict[str, Any] = {"correction": None}


def errors(report: Report) -> dict[str, float]:
    return {site.name: site.error for site in report.sites if site.error is not None}


class Broken(nn.Module):
    """Two layers that share their graphs, with a graph break between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


# ---- what is measured ----------------------------------------------------------------------------


def test_the_errors_are_those_of_a_compiled_model() -> None:
    stack = Stack()
    report = check(stack, X)
    with torch.no_grad():
        torch.compile(stack, backend="amber_eager", options={"check": True})(X)
    assert errors(report) == errors(last_reports()[0])
    assert len(errors(report)) == 4
    assert report.graphs[0].output_error == last_reports()[0].graphs[0].output_error


def test_the_output_is_compared_with_the_dense_model() -> None:
    stack = Stack()
    found = check(stack, X, **PLAIN).output
    with torch.no_grad():
        expected, actual = stack(X).double(), sparse(stack, X).double()
    assert found is not None
    assert found.relative == pytest.approx(float((expected - actual).norm() / expected.norm()))
    assert found.largest == pytest.approx(float((expected - actual).abs().max()))
    assert found.kl is found.top1 is None


def test_logits_have_a_divergence_and_an_agreement() -> None:
    model, inputs = ZOO["llama"].build()
    found = check(model, kwargs=inputs).output
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = torch.compile(model, backend="amber_eager")(**inputs).logits
    p, q = expected.log_softmax(-1), actual.log_softmax(-1)
    kl = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert found is not None
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.top1 == float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
    assert 0 < found.top1 < 1


def test_keeping_everything_is_no_error() -> None:
    report = check(Stack().train(), X, pattern="4:4")
    assert report.output == OutputError(0.0, 0.0)
    assert set(errors(report).values()) == {0.0}


def test_both_runs_meet_the_same_random_numbers() -> None:
    model = nn.Sequential(nn.Dropout(), Stack(), nn.Dropout())
    assert check(model, X, pattern="4:4").output == OutputError(0.0, 0.0)


@pytest.mark.parametrize("name", ["llama_bf16", "gpt2", "bert", "mixtral"])
def test_real_models(name: str) -> None:
    model, inputs = ZOO[name].build()
    report = check(model, kwargs=inputs)
    assert {site.name for site in report.sites if site.decision.sparse} == set(errors(report))
    assert all(0 < error < 1 for error in errors(report).values())
    assert report.output is not None
    assert report.output.kl is not None
    assert 0 < report.output.relative < 1


# ---- several graphs ------------------------------------------------------------------------------


def test_every_graph_and_every_owner_of_a_shared_one_is_measured() -> None:
    report = check(Broken(), X)
    assert len(errors(report)) == 4
    assert len(set(errors(report).values())) == 4
    assert len(report.breaks) >= 1
    assert report.output == check(Stack(), X).output


# ---- the report ----------------------------------------------------------------------------------


def test_the_worst_sites_come_first() -> None:
    report = check(Stack(), X)
    worst = [site.error for site in report.worst()]
    assert worst == sorted(errors(report).values(), reverse=True)
    assert report.worst(2) == report.worst()[:2]
    text = str(report)
    assert text.index(report.worst()[0].name) < text.index(report.worst()[-1].name)
    assert "worst sites" in text
    assert f"output error: {report.output}" in text
    assert report.to_json()["output"]["relative"] == report.output.relative  # type: ignore[union-attr]


def test_an_error_that_is_no_number_is_the_worst() -> None:
    sites = [
        Site(f"s{at}", (8, 8), 1, "linear", dense("rule"), error=error)
        for at, error in enumerate([0.1, math.nan, math.inf, None, 0.2])
    ]
    names = [site.name for site in Report([GraphReport("prefill", sites)]).worst()]
    assert names == ["s1", "s2", "s4", "s0"]


def test_a_model_that_becomes_infinite_only_when_sparse() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(4, 4, bias=False)
            self.down_proj.weight.data.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return (self.down_proj(x) - 1).sqrt()

    report = check(Root(), torch.tensor([[[0.4, 0.4, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]]), **PLAIN)
    assert report.output is not None
    assert math.isnan(report.output.relative)
    assert math.isnan(report.output.largest)
    assert report.to_json()["output"]["relative"] == "nan"
    assert math.isnan(report.graphs[0].output_error or 0)


# ---- nothing changes -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_a_cache_is_not_written(make: type) -> None:
    model, inputs = ZOO["llama"].build()
    cache = make(config=model.config, **({"max_cache_len": 64} if make is StaticCache else {}))
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    before = copy.deepcopy(cache.layers[0].keys), int(cache.get_seq_length())
    report = check(model, kwargs={**inputs, "past_key_values": cache})
    assert int(cache.get_seq_length()) == before[1] == 32
    assert torch.equal(cache.layers[0].keys, before[0])
    dense = check(model, kwargs={**inputs, "past_key_values": cache}, pattern="4:4").output
    assert report.output is not None
    assert dense is not None
    assert report.output.relative > 0 == dense.relative


def test_model_inputs_and_process_stay_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = Stack()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.stack(x.add_(1)) + torch.rand(())

    model, x, counter = Counting(), X.clone(), CompileCounter()
    own = torch.compile(model, backend=counter)
    with torch.no_grad():
        own(x)
    x = X.clone()
    state, versions = torch.get_rng_state(), [one._version for one in model.parameters()]
    report = check(own, x)
    assert report.output is not None
    assert 0 < report.output.relative < 1
    assert torch.equal(x, X)
    assert float(model.calls) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert [one._version for one in model.parameters()] == versions
    assert last_reports() == []
    with torch.no_grad():
        own(x)
    assert counter.frame_count == 1


def test_inputs_that_need_gradients() -> None:
    x = X.clone().requires_grad_() * 1  # no leaf
    assert check(Stack(), x).output == check(Stack(), X).output


# ---- mistakes ------------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"check takes a torch.nn.Module, not function"):
        check(lambda x: x, X)  # type: ignore[arg-type]  # on purpose
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(OptionError, match="weights hold no values"):
        check(model, X)
    with pytest.raises(OptionError, match=r"x= is an input of the model, .* kwargs=\{'x'"):
        check(Stack(), x=X)
    with pytest.raises(OptionError, match=r"did you mean 'pattern'"):
        check(Stack(), X, patern="2:4")
    with pytest.raises(RewriteError, match="cannot be rewritten"):
        check(nn.Linear(60, 64), torch.ones(2, 8, 60), projections="*", strict=True, pattern="8:16")


# ---- comparing outputs ---------------------------------------------------------------------------


def test_equal_infinities_and_nans_are_no_error() -> None:
    a = torch.tensor([1.0, -math.inf, math.nan])
    assert output_error(a, a.clone()) == OutputError(0.0, 0.0)
    b = torch.tensor([1.0, 2.0, math.nan])
    assert output_error(a, b) == OutputError(math.inf, math.inf)
    assert math.isnan(output_error(b[:2], b[1:]).relative)


def test_the_size_of_zeros() -> None:
    zero = torch.zeros(3)
    assert output_error(zero, zero).relative == 0
    assert output_error(zero, zero + 1).relative == math.inf


def test_tensors_that_are_no_floats_are_not_compared() -> None:
    a, b = (torch.tensor([1]), [torch.ones(2)]), (torch.tensor([7]), [torch.full((2,), 1.5)])
    assert output_error(a, b) == OutputError(0.5, 0.5)


def test_large_outputs_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a = {"logits": torch.randn(3, 5, 16)}
    b = {"logits": a["logits"] + torch.randn(3, 5, 16) / 10}
    whole = output_error(a, b)
    monkeypatch.setattr("amber_compile.debug.output_error.CHUNK", 40)
    parts = output_error(a, b)
    assert parts.relative == pytest.approx(whole.relative)
    assert (parts.largest, parts.top1) == (whole.largest, whole.top1)
    assert parts.kl == pytest.approx(whole.kl)


def test_a_token_that_both_rule_out() -> None:
    a = {"logits": torch.tensor([[1.0, -math.inf]])}
    assert output_error(a, a) == OutputError(0.0, 0.0, 0.0, 1.0)


@torch.no_grad()
def test_what_was_compiled_behind_a_break_is_forgotten() -> None:
    check(Broken(), torch.randn(2, 8, 64))
    entries = _debug_get_cache_entry_list(Layer.forward.__code__)
    assert all(type(one.guard_manager) is DeletedGuardManagerWrapper for one in entries)
