"""Calls of amber::derive, in the place of further inputs."""

import pytest
import torch
from programs import KN, NORM, PLAIN, Q, W, X
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.functional import linear

from amber_compile.decision import sparse
from amber_compile.derivations import Matrix, ScoreFactor
from amber_compile.graph import copy_graph, positions
from amber_compile.kernels import nm_select
from amber_compile.passes import find_projections, sparsify_projections, verify
from amber_compile.passes.derived_calls import DerivedCalls
from amber_compile.projection import fake
from amber_compile.request_text import to_text

DERIVE = torch.ops.amber.derive.default
FACTOR = ScoreFactor("weight_norm")


def sparsified(gm, settings=NORM):
    """Sparsify every projection of a copy of ``gm``; what follows from weights is derived in it."""
    gm, _ = copy_graph(gm)
    decided = [(one, sparse(settings)) for one in find_projections(gm)]
    done = sparsify_projections(gm, decided, None, DerivedCalls(gm))
    verify(gm)
    return gm, done


def derived(gm):
    return list(gm.graph.find_nodes(op="call_function", target=DERIVE))


def test_the_factor_is_looked_up_in_the_graph(capture):
    gm, given = capture(lambda x, w: linear(x, w), X, W)
    after, done = sparsified(gm)
    assert list(map(str, positions(after))) == list(map(str, positions(gm)))
    (call,) = derived(after)
    (site,) = [projection for projection, _ in done.sites]
    assert call.args == (site.weight, to_text(FACTOR))
    assert call.name == "amber_weight_norm_0"
    wanted = linear(nm_select(X, FACTOR.compute(W), 2, 4), W)
    with torch.no_grad():
        assert torch.equal(after(*given)[0], wanted)


def test_its_value_is_recorded(capture):
    after, _ = sparsified(capture(lambda x, w: linear(x, w), X, W)[0])
    value = fake(derived(after)[0])
    assert (tuple(value.shape), value.dtype, value.requires_grad) == ((16,), torch.float32, False)


def test_equal_requests_are_one_call(capture):
    def function(x, w, q):
        return linear(x, w), linear(x + 1, w), linear(x, q)

    after, _ = sparsified(capture(function, X, W, Q)[0])
    assert len(derived(after)) == 2


def test_other_requests_of_a_weight_are_other_calls(capture):
    def function(x, w):
        return linear(x, w), x[..., :8] @ w

    after, _ = sparsified(capture(function, X, W)[0])
    requests = [call.args[1] for call in derived(after)]
    # each right behind the inputs, so that the later one comes first
    assert requests == [to_text(ScoreFactor("weight_norm", Matrix(True))), to_text(FACTOR)]


def test_nothing_is_looked_up_for_magnitude(capture):
    after, _ = sparsified(capture(lambda x, w: linear(x, w), X, W)[0], PLAIN)
    assert derived(after) == []


def test_an_attribute_is_derived_from_behind_where_it_is_read():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kn = KN

        def forward(self, x):
            return (x + 1) @ self.kn

    gm = symbolic_trace(Model())
    for node in gm.graph.nodes:
        node.meta["val"] = {"placeholder": X, "get_attr": KN}.get(node.op, X)
    gm.graph.output_node().prev.meta["val"] = X @ KN
    after, _ = sparsified(gm)
    (call,) = derived(after)
    assert call.prev.op == "get_attr"
    with torch.no_grad():
        wanted = nm_select(X + 1, FACTOR.compute(KN.T), 2, 4) @ KN
        assert torch.equal(after(X), wanted)


@pytest.mark.parametrize("again", [1, 2])
def test_the_calls_stand_before_what_reads_them(capture, again):
    def function(x, w, q):
        return linear(linear(x, w).repeat(1, 1, 2 * again)[..., :16], q)

    after, _ = sparsified(capture(function, X, W, Q)[0])
    after.graph.lint()
    order = {node: at for at, node in enumerate(after.graph.nodes)}
    last = max(order[node] for node in positions(after))
    assert all(order[call] > last for call in derived(after))
