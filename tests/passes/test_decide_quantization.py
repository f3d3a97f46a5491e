"""Each reason for which a projection is not quantised."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from amber_compile import Settings
from amber_compile.decision import Decision, dense, sparse
from amber_compile.passes import find_projections
from amber_compile.passes.decide_quantization import decide_quantization, why_not_quantized
from amber_compile.quantization import Quantization

INT8 = Quantization("int8")
X, W = torch.randn(2, 4, 16), nn.Parameter(torch.randn(8, 16))


@pytest.fixture
def project(capture):
    """Return the projection that a function of ``x`` and ``w`` makes."""

    def find(function=linear, x=X, w=W, **changes):
        gm, _ = capture(function, x, w)
        (found,) = find_projections(gm)
        return replace(found, **changes)

    return find


def always(projection):
    return INT8


@pytest.mark.parametrize("decision", [dense("k_proj stays dense"), sparse(Settings())])
def test_sparse_or_not_does_not_matter(project, decision):
    made = decide_quantization(project(), decision, "prefill", always)
    assert made == replace(decision, quantization=INT8)
    assert made.rewritten


def test_what_was_not_asked_for_leaves_no_trace(project):
    decision = dense("k_proj stays dense")
    assert decide_quantization(project(), decision, "prefill", lambda one: None) is decision


def test_a_plan_may_say_no(project):
    decision = dense("lm_head")
    made = decide_quantization(project(), decision, "prefill", lambda one: f"{one.name} is fine")
    assert made.quantization is None
    assert made.unquantized.endswith("is fine")
    assert not made.unquantized_obstacle


@pytest.mark.parametrize(("decode", "quantized"), [(False, False), (True, True)])
def test_decode_is_quantised_if_that_was_asked_for(project, decode, quantized):
    decision = dense("decode: one token a sequence")
    made = decide_quantization(project(), decision, "decode", always, decode=decode)
    assert (made.quantization is not None) == quantized
    assert (made.unquantized == "decode: its weights stay as they are") != quantized
    assert not made.unquantized_obstacle


def test_gradients_are_an_obstacle(project):
    made = decide_quantization(project(), dense("why"), "prefill", always, needs_grad=True)
    assert made.unquantized_obstacle
    assert "torch.no_grad()" in made.unquantized


def experts(one):
    return replace(one, shape=(4, 8, 16))


def twice(x, w):
    return torch.addmm(torch.ones(8), x[0], w.t(), beta=2)


@pytest.mark.parametrize(
    ("function", "x", "w", "reason"),
    [
        (linear, X.double(), nn.Parameter(W.detach().double()), "valid to quantise: torch.float32"),
        (linear, X[..., :8], nn.Parameter(torch.randn(4, 8)), "K = 8 is too small to quantise"),
        (lambda x, w: w @ x[0].t(), X, W, "its weight is the left operand"),
        (twice, X, W, "addmm has no 8-bit product in this form"),
    ],
)
def test_obstacles(project, function, x, w, reason):
    found = project(function, x, w)
    assert reason in why_not_quantized(found)
    made = decide_quantization(found, dense("why"), "prefill", always)
    assert made.quantization is None
    assert made.unquantized_obstacle


def test_grouped_experts_have_no_product(project):
    assert why_not_quantized(experts(project())) == "grouped experts have no 8-bit product"


def test_an_unsupported_spelling_has_its_reason(project):
    assert why_not_quantized(project(unsupported="it lies inside a nested graph")) == (
        "it lies inside a nested graph"
    )


@pytest.mark.parametrize(
    "function",
    [
        linear,
        lambda x, w: x @ w.t(),
        lambda x, w: torch.matmul(x, w.t()),
        lambda x, w: torch.mm(x[0], w.t()),
        lambda x, w: torch.addmm(torch.ones(8), x[0], w.t()),
        lambda x, w: linear(x, w, torch.ones(8)),
    ],
)
def test_what_nothing_prevents(project, function):
    assert why_not_quantized(project(function)) is None


def test_the_least_channels(project):
    x, w = torch.randn(2, 4, 16), nn.Parameter(torch.randn(4, 16))
    assert why_not_quantized(project(linear, x, w)) is None


def test_a_decision_is_either_quantised_or_says_why_not():
    with pytest.raises(ValueError, match="either quantised or has a reason"):
        Decision(reason="dense", quantization=INT8, unquantized="why")
