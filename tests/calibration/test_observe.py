"""Products of a model with its weights are seen and answered, and nothing of it stays."""

import copy

import pytest
import torch
from torch import Tensor, nn

from amber_compile.calibration.observe import Call, observing, tapped, weights_of
from amber_compile.explain import explain

pytest.importorskip("transformers")
from zoo import ZOO

SPELLINGS = {
    "linear": lambda x, w, b: nn.functional.linear(x, w, b),
    "keywords": lambda x, w, b: nn.functional.linear(input=x, weight=w, bias=b),
    "matmul": lambda x, w, b: x @ w.t(),
    "transpose": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "mm": lambda x, w, b: torch.mm(input=x, mat2=w.t()),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
}


def seen(weight: Tensor, run, answer=lambda call: call()) -> tuple[list[Call], Tensor]:
    calls: list[Call] = []

    def visit(call: Call) -> Tensor:
        calls.append(call)
        return answer(call)

    with observing({"site": weight}, visit):
        return calls, run()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_product(spelling: str) -> None:
    x, w, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    expected = SPELLINGS[spelling](x, w, b)
    calls, actual = seen(w, lambda: SPELLINGS[spelling](x, w, b))
    assert torch.equal(actual, expected)
    (call,) = calls
    assert call.name == "site"
    assert call.weight.data_ptr() == w.data_ptr()
    assert torch.equal(call.weight, w)
    other, updated = torch.randn(5, 8), torch.randn(6, 8)
    assert torch.equal(call(other, updated), SPELLINGS[spelling](other, updated, b))


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w[:, :4],  # a part of the weight
        lambda x, w: x @ (w * 2),
        lambda x, w: (w.t() @ x.t()).t(),  # the weight is the left operand
        lambda x, w: x @ w.clone(),
        lambda x, w: x * w[:5, :].sum(),
    ],
)
def test_other_products_are_not_seen(product) -> None:
    x, w = torch.randn(5, 8), torch.randn(8, 8)
    calls, actual = seen(w, lambda: product(x, w))
    assert calls == []
    assert torch.equal(actual, product(x, w))


def test_an_answer_takes_the_place_of_a_product() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    with observing({"0": model[0].weight}, lambda call: torch.zeros_like(call())), torch.no_grad():
        assert torch.equal(model(x), model[1].bias.expand(3, 2))
    assert not torch.equal(model(x), model[1].bias.expand(3, 2))


def test_gradients_are_those_of_autograd_and_nothing_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 4)
    found: dict[str, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True)

    def visit(call: Call) -> Tensor:
        inside = tapped(call.x, anchor, lambda g: found.update({f"{call.name}.x": g}))
        return tapped(call(inside), anchor, lambda g: found.update({f"{call.name}.y": g}))

    with observing(weights_of(model, ["0", "2"]), visit):
        loss = model(x).square().sum()
    torch.autograd.grad(loss, anchor)
    leaf = x.clone().requires_grad_()
    first = model[0](leaf)
    middle = model[1](first)
    last = model[2](middle)
    expected = torch.autograd.grad(last.square().sum(), [leaf, first, middle, last])
    for name, gradient in zip(("0.x", "0.y", "2.x", "2.y"), expected, strict=True):
        assert torch.equal(found[name], gradient)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert "forward" not in vars(model[0])


def test_a_weight_of_two_names_has_the_first() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert list(weights_of(model, ["a", "b", "c"])) == ["a"]


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gpt_oss", "bert"])
def test_what_the_backend_can_rewrite_is_seen(name: str) -> None:
    model, inputs = ZOO[name].build()
    report = explain(model, kwargs=inputs, projections=["*"])
    sites = {site.name: site for site in report.sites if site.decision.sparse}
    calls: dict[str, Call] = {}

    def visit(call: Call) -> Tensor:
        calls[call.name] = call
        return call()

    weights = weights_of(model, sites)
    with torch.no_grad(), observing(weights, visit):
        actual = model(**inputs).logits
    assert sites
    assert list(calls) == [site for site in sites if site in weights]
    assert set(sites) == set(calls)
    assert {call: tuple(calls[call].weight.shape) for call in calls} == {
        site: sites[site].shape for site in sites
    }
    with torch.no_grad():
        assert torch.equal(actual, model(**inputs).logits)
