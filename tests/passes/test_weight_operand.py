"""From a matmul's operand back to its parameter: what is followed, and what is not."""

import pytest
import torch
from torch import nn

from amber_compile.passes.weight_operand import weight_operands

W = nn.Parameter(torch.randn(8, 16))
SQUARE = nn.Parameter(torch.randn(16, 16))
STACK = nn.Parameter(torch.randn(3, 8, 16))
X = torch.randn(4, 16)


@pytest.fixture
def trace(capture):
    """Return ``trace(function, x, w)``: what the result of ``function(x, w)`` is made from."""

    def run(function, x, w):
        gm, _ = capture(lambda x, w: (torch.special.erf(function(x, w)), x.sum()), x, w)
        marker = next(node for node in gm.graph.nodes if "erf" in node.name)
        return weight_operands(gm.graph).get(marker.args[0])

    return run


SAME = {
    "itself": lambda x, w: w,
    "to": lambda x, w: w.to(torch.bfloat16),
    "type": lambda x, w: w.type(torch.bfloat16),
    "float": lambda x, w: w.float(),
    "half": lambda x, w: w.half(),
    "bfloat16": lambda x, w: w.bfloat16(),
    "detach": lambda x, w: w.detach(),
    "contiguous": lambda x, w: w.t().contiguous().t(),
    "twice": lambda x, w: w.t().T,
    "swapped twice": lambda x, w: w.transpose(0, 1).transpose(-1, -2),
}


@pytest.mark.parametrize("function", SAME.values(), ids=SAME.keys())
def test_the_parameter_itself(trace, function):
    operand = trace(function, X, W)
    assert operand.parameter.op == "placeholder"
    assert (operand.transposed, operand.derived) == (False, None)


TRANSPOSED = {
    "t": lambda x, w: w.t(),
    "T": lambda x, w: w.T,
    "mT": lambda x, w: w.mT,
    "adjoint": lambda x, w: w.adjoint(),
    "transpose": lambda x, w: w.transpose(-1, -2),
    "transpose of dimensions": lambda x, w: torch.transpose(w, 1, 0),
    "permute": lambda x, w: w.permute(1, 0),
    "swapaxes": lambda x, w: w.swapaxes(0, 1),
    "and cast": lambda x, w: w.t().to(torch.bfloat16),
}


@pytest.mark.parametrize("function", TRANSPOSED.values(), ids=TRANSPOSED.keys())
@pytest.mark.parametrize("weight", [W, SQUARE], ids=["8x16", "16x16"])
def test_transposes(trace, function, weight):
    operand = trace(function, X, weight)
    assert (operand.transposed, operand.derived) == (True, None)


@pytest.mark.parametrize(
    ("function", "step"),
    [
        (lambda x, w: w[:4], "getitem"),
        (lambda x, w: w[:, :8], "getitem"),
        (lambda x, w: w * 2, "mul"),
        (lambda x, w: w.t() * 2, "mul"),
        (lambda x, w: (w * 2).t(), "mul"),
        (lambda x, w: torch.cat([w, w]), "cat"),
        (lambda x, w: w @ w.t(), "matmul"),
        (lambda x, w: w / w.norm(), "truediv"),
        (lambda x, w: w.view(16, 8), "view"),  # no transpose: other elements side by side
        (lambda x, w: w.permute(0, 1) + 0, "permute"),
    ],
)
def test_what_else_was_computed(trace, function, step):
    operand = trace(function, X, W)
    assert operand.derived == step


def test_a_permutation_that_swaps_nothing_is_no_transpose(trace):
    operand = trace(lambda x, w: w.permute(0, 1), X, W)
    assert operand is None or not operand.transposed


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x,
        lambda x, w: x + 1,
        lambda x, w: x @ w.t(),
        lambda x, w: w * x.sum(),
        lambda x, w: x.sum() * w,
        lambda x, w: torch.cat([w, x]),
    ],
)
def test_an_activation_has_a_part_in_it(trace, function):
    assert trace(function, X, W) is None


@pytest.mark.parametrize(
    "function",
    [lambda x, w: w[1], lambda x, w: w.select(0, 1), lambda x, w: w[torch.tensor([0, 2])]],
)
def test_experts_are_whole_matrices(trace, function):
    operand = trace(function, X, STACK)
    assert (operand.transposed, operand.derived) == (False, None)


@pytest.mark.parametrize(
    "function", [lambda x, w: w[:, 1], lambda x, w: w[:2], lambda x, w: w.select(1, 1)]
)
def test_parts_of_experts_are_not(trace, function):
    assert trace(function, X, STACK).derived is not None


def test_an_expert_chosen_by_an_activation(trace):
    operand = trace(lambda x, w: w[x.argmax(-1) % 3], X, STACK)
    assert operand.derived is None


def test_an_expert_is_transposed_like_any_matrix(trace):
    assert trace(lambda x, w: w[1].t(), X, STACK).transposed
    assert trace(lambda x, w: w.transpose(1, 2)[1], X, STACK).transposed
    assert not trace(lambda x, w: w.transpose(0, 1), X, STACK).transposed


# ---- what is a weight ----


class Holder(nn.Module):
    def __init__(self, tensor: torch.Tensor, parameter: bool) -> None:
        super().__init__()
        if parameter:
            self.held = nn.Parameter(tensor, requires_grad=False)
        else:
            self.register_buffer("held", tensor)

    def forward(self, x):
        return x + self.held.sum() if self.held.is_floating_point() else x + self.held.sum().float()


@pytest.mark.parametrize(
    ("tensor", "parameter", "is_weight"),
    [
        (torch.randn(8, 16), True, True),
        (torch.randn(8, 16), False, True),  # a frozen weight kept as a buffer
        (torch.randn(16), True, True),
        (torch.randn(16), False, False),  # running statistics, inverse frequencies
        (torch.zeros(8, 16, dtype=torch.int8), True, True),  # a quantised weight, to be listed
        (torch.zeros(8, 16, dtype=torch.int8), False, True),
        (torch.zeros(8, 16, dtype=torch.int64), False, False),  # positions
        (torch.zeros(8, 16, dtype=torch.bool), False, False),  # a mask
    ],
)
def test_parameters_and_large_buffers_are_weights(capture, tensor, parameter, is_weight):
    gm, _ = capture(Holder(tensor, parameter), X)
    held = next(node for node in gm.graph.nodes if "held" in node.name)
    assert (held in weight_operands(gm.graph)) is is_weight


def test_an_input_is_no_weight(capture):
    gm, _ = capture(lambda x, y: x @ y, X, torch.randn(16, 8))
    assert weight_operands(gm.graph) == {}
