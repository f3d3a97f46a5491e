"""A residual that was joined to a product: parted from it, and joined again."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from amber_compile.passes.part_residuals import join_residuals, part_residuals

aten = torch.ops.aten
X, W, RESIDUAL, BIAS = torch.randn(5, 8), torch.randn(4, 8), torch.randn(5, 4), torch.randn(4)


def product(residual, x, w):
    return aten.relu(aten.addmm(residual, x, aten.permute(w, [1, 0])))


def traced(function, *inputs):
    gm = make_fx(function, tracing_mode="symbolic")(*inputs)
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = {"": ("L['self'].norm", object)}
    for node in gm.graph.find_nodes(op="call_function", target=aten.permute.default):
        node.meta["nn_module_stack"] = {"": ("L['self'].o_proj", object)}
    return gm


def calls(gm):
    found = [node for node in gm.graph.nodes if node.op == "call_function"]
    return [(node.target, node.meta["nn_module_stack"][""][0][10:]) for node in found]


def test_a_residual_is_parted_under_the_name_of_the_weight():
    gm = traced(product, RESIDUAL, X, W)
    ((multiplied, added),) = part_residuals(gm.graph)
    assert (multiplied.target, added.target) == (aten.mm.default, aten.add.Tensor)
    gm.recompile()
    gm.graph.lint()
    assert calls(gm) == [
        (aten.permute.default, "o_proj"),
        (aten.mm.default, "o_proj"),
        (aten.add.Tensor, "norm"),
        (aten.relu.default, "norm"),
    ]
    assert all(value.meta["val"].shape == (5, 4) for value in (multiplied, added))
    torch.testing.assert_close(gm(RESIDUAL, X, W), product(RESIDUAL, X, W))


def test_what_is_joined_again_is_as_it_was():
    gm = traced(product, RESIDUAL, X, W)
    before = calls(gm)
    assert join_residuals(gm.graph, part_residuals(gm.graph)) == 1
    gm.recompile()
    assert calls(gm) == before
    assert torch.equal(gm(RESIDUAL, X, W), product(RESIDUAL, X, W))


def test_a_product_that_something_else_reads_stays_parted():
    gm = traced(product, RESIDUAL, X, W)
    ((multiplied, added),) = part_residuals(gm.graph)
    with gm.graph.inserting_after(multiplied):
        doubled = gm.graph.call_function(aten.mul.Tensor, (multiplied, 2))
    added.replace_input_with(multiplied, doubled)
    assert join_residuals(gm.graph, [(multiplied, added)]) == 0


def bias(b, x, w):
    return aten.addmm(b, x, aten.permute(w, [1, 0]))


def scaled(residual, x, w):
    return aten.addmm(residual, x, aten.permute(w, [1, 0]), alpha=2)


def as_stored(residual, x, w):
    return aten.addmm(residual, x, w)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(bias, (BIAS, X, W)), (scaled, (RESIDUAL, X, W)), (as_stored, (RESIDUAL, X, W.t()))],
)
def test_left_alone(function, inputs):
    assert part_residuals(traced(function, *inputs).graph) == []
