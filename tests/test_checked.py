"""``check=True``: dense and sparse side by side on the first call, and no trace of it."""

import pytest
import torch
from emulate import Settings, prune
from stack import Stack, sparse
from torch import Tensor, nn
from transformers import StaticCache
from zoo import ZOO

from amber_compile import last_reports

CHECKED = {"correction": None, "check": True}
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


def relative(expected: Tensor, actual: Tensor) -> float:
    """Return ‖expected - actual‖ / ‖expected‖."""
    return float((expected.double() - actual.double()).norm() / expected.double().norm())


def pruned(x: Tensor, linear: nn.Linear) -> Tensor:
    kept = prune(x, linear.weight, torch.arange(x.shape[-2]), Settings(2, 4))
    return nn.functional.linear(kept, linear.weight)


@torch.no_grad()
def test_a_site_is_measured_on_the_input_that_it_really_has() -> None:
    stack = Stack()
    torch.compile(stack, backend="amber_eager", options=CHECKED)(X)
    first, second = stack.layers
    middle = pruned(X, first.gate_proj).relu() * first.up_proj(X)
    x = X + pruned(middle, first.down_proj)  # sparse so far, as in the model
    expected = {
        "layers.0.gate_proj": (first.gate_proj, X),
        "layers.0.down_proj": (first.down_proj, middle),
        "layers.1.gate_proj": (second.gate_proj, x),
    }
    errors = {site.name: site.error for site in last_reports()[0].sites}
    for name, (linear, into) in expected.items():
        assert errors[name] == pytest.approx(relative(linear(into), pruned(into, linear)))
    assert errors["layers.0.up_proj"] is None


@torch.no_grad()
def test_the_outputs_of_the_graph_are_compared() -> None:
    stack = Stack()
    torch.compile(stack, backend="amber_eager", options=CHECKED)(X)
    expected = relative(stack(X), sparse(stack, X))
    assert last_reports()[0].graphs[0].output_error == pytest.approx(expected)


@torch.no_grad()
def test_only_the_first_call_is_measured() -> None:
    stack = Stack()
    run = torch.compile(stack, backend="amber_eager", options=CHECKED)
    run(X)
    before = last_reports()[0].to_json()
    run(X + 1)
    assert last_reports()[0].to_json() == before


@torch.no_grad()
def test_a_score_that_needs_no_factor_is_measured_too() -> None:
    run = torch.compile(Stack(), backend="amber_eager", options=CHECKED | {"score": "magnitude"})
    run(X)
    assert last_reports()[0].sites[0].error > 0


@torch.no_grad()
def test_keeping_everything_is_no_error() -> None:
    torch.compile(Stack(), backend="amber_eager", options=CHECKED | {"pattern": "4:4"})(X)
    assert last_reports()[0].graphs[0].output_error == 0
    assert last_reports()[0].sites[0].error == 0


@torch.no_grad()
def test_a_static_cache_is_written_once() -> None:
    model, inputs = ZOO["llama"].build()

    def prefill(check: bool) -> tuple[Tensor, Tensor, int]:
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=48)
        run = torch.compile(model, backend="amber_eager", options={"check": check})
        for start in (0, 16):  # the second chunk finds a cache that exists: an input of the graph
            ids = inputs["input_ids"][:, start : start + 16]
            logits = run(input_ids=ids, past_key_values=cache).logits
        return logits, cache.layers[0].keys, int(cache.get_seq_length())

    plain, checked = prefill(check=False), prefill(check=True)
    assert all(torch.equal(*pair) for pair in zip(plain[:2], checked[:2], strict=True))
    assert checked[2] == 32
    assert all(report.graphs[0].output_error for report in last_reports()[-2:])


def test_the_table_shows_the_errors() -> None:
    with torch.no_grad():
        torch.compile(Stack(), backend="amber_eager", options=CHECKED)(X)
    report = last_reports()[0]
    assert f"{report.sites[0].error:.4f}" in str(report)
