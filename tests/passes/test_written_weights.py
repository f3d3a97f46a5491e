"""A weight that its own graph writes to is no weight to derive anything from."""

import pytest
import torch
from programs import KN, W, X
from torch import nn
from torch.nn.functional import linear

from amber_compile.passes.find_projections import find_projections

REASON = "the graph writes to its weight"


def after(x, w):
    y = linear(x, w)
    w.mul_(0.5)
    return y


def before(x, w):
    w.mul_(0.5)
    return linear(x, w)


def through_a_view(x, w):
    y = linear(x, w)
    w[0].zero_()
    return y


def by_item(x, w):
    y = linear(x, w)
    w[0] = 1
    return y


def reasons(capture, function, *inputs):
    gm, _ = capture(function, *inputs)
    return [one.unsupported for one in find_projections(gm)]


@pytest.mark.parametrize("function", [after, before, through_a_view, by_item])
def test_a_weight_that_is_written_to(capture, function):
    assert reasons(capture, function, X, nn.Parameter(W.detach().clone())) == [REASON]


def test_other_writes_do_not_matter(capture):
    def function(x, w, other):
        other.mul_(0.5)
        x.add_(1)
        return linear(x, w), linear(x, w * 1)

    given = X.clone(), W, nn.Parameter(torch.ones(3, 3))
    first, second = reasons(capture, function, *given)
    assert first is None
    assert "computed from a parameter" in str(second)


def test_an_earlier_reason_stays(capture):
    def function(x, w):
        y = w @ x.transpose(1, 2)
        w.mul_(0.5)
        return y

    (reason,) = reasons(capture, function, X, nn.Parameter(KN.detach().T.clone()))
    assert "left operand" in str(reason)
