"""Each reason for which a projection stays dense, and the order in which they count."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.nn.functional import linear

from amber_compile import Pattern, Projection, Settings
from amber_compile.decision import blocked, dense, sparse
from amber_compile.kernels import nm_linear, nm_select
from amber_compile.passes import decide, find_projections
from amber_compile.passes.decide import is_selected, why_not

PLAIN = Settings(Pattern(2, 4), "magnitude")
W = nn.Parameter(torch.empty(8, 16))


def planned(projection):
    return PLAIN


def projection(
    x: torch.Tensor | None = None, weight: torch.Tensor = W, target=linear, **changes
) -> Projection:
    """Return the projection of a graph with nothing else in it."""
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("x", "w")]
    values = (torch.empty(2, 4, 16) if x is None else x, weight)
    for node, value in zip(nodes, values, strict=True):
        node.meta["example_value"] = value
    product = graph.call_function(target, tuple(nodes))
    made = Projection("q_proj", product, *nodes, tuple(weight.shape), False, "linear")
    return replace(made, **changes)


def test_nothing_in_the_way():
    assert decide(projection(), "prefill", planned) == sparse(PLAIN)


def test_an_unknown_phase_is_left_to_run_time():
    assert decide(projection(), "unknown", planned) == sparse(PLAIN)


def test_a_plan_may_say_no():
    chosen = decide(projection(), "prefill", lambda one: f"{one.name} stays dense")
    assert chosen == dense("q_proj stays dense")
    assert not chosen.obstacle


def test_decode_stays_dense_and_is_no_obstacle():
    assert decide(projection(), "decode", planned) == dense("decode: one token a sequence")


@pytest.mark.parametrize(
    ("one", "settings", "reason"),
    [
        (projection(unsupported="no such spelling"), PLAIN, "no such spelling"),
        (
            projection(weight=torch.empty(8, 16, device="meta")),
            PLAIN,
            "its weight is a meta tensor and holds no values",
        ),
        (
            projection(x=torch.empty(2, 4, 16, dtype=torch.int64)),
            PLAIN,
            "dtype torch.int64 x torch.float32; valid: torch.float32, torch.bfloat16, "
            "torch.float16, torch.float64",
        ),
        (
            projection(weight=torch.empty(8, 16, dtype=torch.float8_e4m3fn)),
            PLAIN,
            "dtype torch.float32 x torch.float8_e4m3fn; valid: torch.float32, torch.bfloat16, "
            "torch.float16, torch.float64",
        ),
        (projection(shape=(8, 18)), PLAIN, "K = 18 is not a multiple of M = 4"),
        (projection(shape=(8, 24)), replace(PLAIN, pattern="8:16"), "K = 24 is not a multiple of"),
        (projection(), replace(PLAIN, part="gate"), "the graph does not show a gate and an up"),
        (
            projection(x=torch.empty(8, 16)),
            replace(PLAIN, dense_prefix=1),
            "dense_prefix needs the sequence dimension",
        ),
        (
            projection(x=torch.empty(2, 4, 3, 16)),  # B, S, heads: the sequence is not next to K
            replace(PLAIN, dense_prefix=1),
            "dense_prefix needs the sequence dimension",
        ),
        (
            projection(shape=(3, 8, 16)),
            replace(PLAIN, dense_prefix=1),
            "dense_prefix needs the sequence dimension",
        ),
    ],
)
def test_obstacles(one, settings, reason):
    chosen = decide(one, "prefill", lambda _: settings)
    assert chosen == blocked(chosen.reason)
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("one", "settings"),
    [
        (projection(x=torch.empty(8, 16)), PLAIN),
        (projection(x=torch.empty(2, 4, 3, 16)), PLAIN),
        (projection(), replace(PLAIN, dense_prefix=1)),
        (projection(gate_rows=4), replace(PLAIN, part="gate")),
        (projection(shape=(8, 24)), replace(PLAIN, pattern="4:8")),
        (projection(shape=(8, 6)), replace(PLAIN, pattern="1:2")),
        (projection(x=torch.empty(4, 16, dtype=torch.bfloat16)), PLAIN),  # autocast casts
        (projection(x=torch.empty(4, 16, dtype=torch.float64), weight=W.double()), PLAIN),
    ],
)
def test_no_obstacles(one, settings):
    assert why_not(one, settings) is None


def test_a_device_without_kernels():
    elsewhere = FakeTensor(FakeTensorMode(), torch.empty(8, 16, device="meta"), "xpu:0")
    reason = why_not(projection(weight=elsewhere), PLAIN)
    assert reason == "no kernel for device 'xpu'; valid: cpu, cuda"


def test_a_weight_that_is_no_plain_tensor():
    class Twice(torch.Tensor):
        """A wrapper subclass, as quantisation libraries and DTensor have them."""

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            return Twice(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return NotImplemented

    reason = why_not(projection(weight=Twice(torch.empty(8, 16))), PLAIN)
    assert reason == "its weight is a Twice, not a plain tensor"


def test_a_residual_that_is_the_input_itself(capture):
    gm, _ = capture(lambda x, w: torch.addmm(x, x, w), torch.empty(16, 16), W.new_empty(16, 16))
    assert find_projections(gm) == []  # a plain tensor is no weight
    weight = nn.Parameter(torch.empty(16, 16))
    gm, _ = capture(lambda x, w: torch.addmm(x, x, w), torch.empty(16, 16), weight)
    (one,) = find_projections(gm)
    assert decide(one, "unknown", planned) == blocked(
        "its input is also what the product is added to"
    )


def test_another_residual_is_no_obstacle(capture):
    weight, x = nn.Parameter(torch.empty(16, 16)), torch.empty(16, 16)
    gm, _ = capture(lambda x, y, w: torch.addmm(y, x, w), x, x.clone(), weight)
    (one,) = find_projections(gm)
    assert decide(one, "unknown", planned) == sparse(PLAIN)


@pytest.mark.parametrize(("tokens", "answer"), [(7, False), (8, True), (9, True), (None, True)])
def test_min_tokens(tokens, answer):
    chosen = decide(projection(), "prefill", planned, tokens=tokens, min_tokens=8)
    assert chosen.sparse is answer
    if not answer:
        assert chosen == dense("7 tokens are fewer than min_tokens=8")


def test_gradients_are_an_obstacle():
    chosen = decide(projection(), "prefill", planned, needs_grad=True)
    assert chosen == blocked("the graph needs gradients: call the model under torch.no_grad()")


def test_the_plan_comes_first_then_decode_then_obstacles_then_gradients():
    one = projection(unsupported="no such spelling")

    def answer(phase, choose=planned):
        return decide(one, phase, choose, tokens=1, min_tokens=8, needs_grad=True).reason

    assert answer("decode", lambda _: "k_proj stays dense") == "k_proj stays dense"
    assert answer("decode") == "decode: one token a sequence"
    assert answer("prefill") == "no such spelling"
    one = projection()
    assert "gradients" in answer("prefill")


# ---- what was selected already ----


def selected(capture, function) -> tuple[Projection, Node]:
    gm, _ = capture(function, torch.empty(2, 4, 16), nn.Parameter(torch.empty(16, 16)))
    return find_projections(gm)[-1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: linear(nm_select(x, None, 2, 4), w),
        lambda x, w: linear(nm_select(x, None, 2, 4).view(-1, 16), w),
        lambda x, w: linear(nm_select(x, None, 2, 4).flatten(0, 1).contiguous(), w),
        lambda x, w: linear(nm_select(x, None, 2, 4).view(-1, 16).view_as(x), w),
    ],
)
def test_a_selection_is_not_selected_again(capture, function):
    one = selected(capture, function)
    assert is_selected(one.x)
    chosen = decide(one, "prefill", planned)
    assert chosen == dense("its input is already a selection")
    assert not chosen.obstacle


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: linear(nm_select(x, None, 2, 4) + 1, w),
        lambda x, w: linear(nm_linear(x, w, None, None, 2, 4), w),
        lambda x, w: linear(linear(nm_select(x, None, 2, 4), w), w),
        lambda x, w: linear(x.view(-1, 16), w),
    ],
)
def test_what_was_computed_from_a_selection_is_none(capture, function):
    one = selected(capture, function)
    assert not is_selected(one.x)
    assert decide(one, "prefill", planned) == sparse(PLAIN)
