"""Which nodes are projections, what is read off them, and why some cannot be sparsified."""

import operator

import pytest
import torch
from torch import nn
from torch.nn.functional import bilinear, linear
from torch.utils.checkpoint import checkpoint

from amber_compile.passes import find_projections

X = torch.randn(2, 4, 16)
ROWS = torch.randn(8, 16)
W = nn.Parameter(torch.randn(8, 16))
KN = nn.Parameter(torch.randn(16, 8))
B = nn.Parameter(torch.randn(8))
STACK = nn.Parameter(torch.randn(3, 16, 8))


@pytest.fixture
def found(capture):
    """Return ``found(function, *inputs)``: the projections of its graph."""
    return lambda function, *inputs: find_projections(capture(function, *inputs)[0])


LINEAR = {
    "linear": lambda x, w, b: linear(x, w),
    "linear with a bias": lambda x, w, b: linear(x, w, b),
    "linear by keyword": lambda x, w, b: linear(weight=w, input=x),
    "linear overload": lambda x, w, b: torch.ops.aten.linear.default(x, w, b),
    "matmul by w.T": lambda x, w, b: x @ w.T,
    "matmul by w.t()": lambda x, w, b: torch.matmul(x, w.t()),
    "method": lambda x, w, b: x.matmul(w.transpose(0, 1)),
    "cast": lambda x, w, b: linear(x.bfloat16(), w.to(torch.bfloat16)),
    "transposed twice": lambda x, w, b: linear(x, w.t().t()),
}


@pytest.mark.parametrize("function", LINEAR.values(), ids=LINEAR.keys())
def test_a_weight_of_rows(found, function):
    (one,) = found(function, X, W, B)
    assert (one.name, one.shape, one.transposed, one.unsupported) == ("w", (8, 16), False, None)
    assert (one.channels, one.macs) == (16, 128)
    assert tuple(one.x.meta["example_value"].shape) == (2, 4, 16)


TRANSPOSED = {
    "mm": lambda x, w, b: torch.mm(x, w),
    "mm method": lambda x, w, b: x.mm(w),
    "mm overload": lambda x, w, b: torch.ops.aten.mm.default(x, w),
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "matmul method": lambda x, w, b: x.matmul(w),
    "@": lambda x, w, b: x @ w,
    "operator": lambda x, w, b: operator.matmul(x, w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "addmm method": lambda x, w, b: b.addmm(x, w),
    "addmm by keyword": lambda x, w, b: torch.addmm(b, mat1=x, mat2=w),
    "linear by w.T": lambda x, w, b: linear(x, w.T, b),
}


@pytest.mark.parametrize("function", TRANSPOSED.values(), ids=TRANSPOSED.keys())
def test_a_weight_of_columns(found, function):
    (one,) = found(function, ROWS, KN, B)
    assert (one.name, one.shape, one.transposed, one.unsupported) == ("w", (8, 16), True, None)
    assert tuple(one.x.meta["example_value"].shape) == (8, 16)
    assert "w" in one.weight.name


NONE = {
    "two activations": lambda x, w, b: x @ x.transpose(1, 2),
    "attention": lambda x, w, b: torch.softmax(x @ x.mT, -1) @ x,
    "attention, scaled": lambda x, w, b: nn.functional.scaled_dot_product_attention(x, x, x),
    "two parameters": lambda x, w, b: (w @ w.T).sum() + x,
    "a plain tensor": lambda x, w, b: linear(x, x[0]),
    "elementwise": lambda x, w, b: x * w[0] + b[0],
    "a vector": lambda x, w, b: torch.cat([x, x], -1).view(8, 4, 8) @ b,
    "an einsum of activations": lambda x, w, b: torch.einsum("bsk,btk->bst", x, x),
    "an embedding": lambda x, w, b: nn.functional.embedding(x[..., 0].long().clamp(0, 7), w),
}


@pytest.mark.parametrize("function", NONE.values(), ids=NONE.keys())
def test_no_projections(found, function):
    assert found(function, X, W, B) == []


UNSUPPORTED = {
    "a slice": (lambda x, w: linear(x, w[:4]), "its weight is computed from a parameter (getitem)"),
    "a product": (lambda x, w: linear(x, w * 2), "its weight is computed from a parameter (mul)"),
    "two weights": (lambda x, w: linear(x, torch.cat([w, w])), "computed from a parameter (cat)"),
    "einsum": (
        lambda x, w: torch.einsum("bsk,nk->bsn", x, w),
        "einsum does not show which dimension is contracted",
    ),
    "tensordot": (lambda x, w: torch.tensordot(x, w, [[2], [1]]), "tensordot does not show"),
    "the weight first": (
        lambda x, w: torch.matmul(w, x.transpose(1, 2)),
        "its weight is the left operand",
    ),
}


@pytest.mark.parametrize(("function", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_a_spelling_that_cannot_be_sparsified_is_told(found, function, reason):
    (one,) = found(function, X, W)
    assert one.unsupported is not None
    assert reason in one.unsupported
    assert one.name == "w"


def test_a_bilinear_has_a_reason_for_each_use(found):
    weight = nn.Parameter(torch.randn(8, 16, 16))
    (one,) = found(lambda x, w: bilinear(x, x, w), ROWS, weight)
    assert "bilinear does not show" in str(one.unsupported)


def test_a_stack_needs_offsets(found):
    (one,) = found(lambda x, w: torch.bmm(x, w), torch.randn(3, 4, 16), STACK)
    assert one.shape == (3, 8, 16)
    assert "only grouped_mm says which rows meet which" in str(one.unsupported)


def test_one_matrix_of_a_stack(found):
    (one,) = found(lambda x, w: x @ w[1], X, STACK)
    assert one.name == "w"
    assert "stack of matrices" in str(one.unsupported)


def test_order_of_execution(found):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(8, 16)
            self.up = nn.Linear(16, 8)

        def forward(self, x):
            return self.down(self.up(x).relu())

    assert [one.name for one in found(nn.Sequential(Block(), Block()), X)] == [
        "0.up",
        "0.down",
        "1.up",
        "1.down",
    ]


def test_a_module_called_twice_is_found_twice(found):
    module = nn.Linear(16, 16)
    first, second = found(nn.Sequential(module, module), X)
    assert first.weight is second.weight
    assert first.node is not second.node


def test_a_checkpoint_hides_its_projections(found):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x):
            return self.up(checkpoint(self.up, x, use_reentrant=False))

    nested, plain = found(Block(), X)
    assert "nested graph" in str(nested.unsupported)
    assert plain.unsupported is None
    assert nested.name == plain.name == "up"


def test_gate_rows_are_read_off_a_linear(found):
    def halves(x, w):
        gate, up = linear(x, w).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    (one,) = found(halves, X, W)
    assert one.gate_rows == 4
    (one,) = found(lambda x, w: linear(x, w).relu(), X, W)
    assert one.gate_rows is None


def test_gate_rows_of_a_matmul_are_not(found):
    def halves(x, w):
        gate, up = (x @ w).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    (one,) = found(halves, X, KN)
    assert one.gate_rows is None
