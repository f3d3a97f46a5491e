"""Prefill, decode or unknown; and how many tokens a graph has."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from amber_compile.passes import classify_phase, find_projections
from amber_compile.passes.classify_phase import fixed_tokens, reshapes_of, token_hints

W = nn.Parameter(torch.randn(16, 16))


@pytest.fixture
def projections(capture):
    """Return ``projections(function, x, ...)``: those of a graph with ``W`` after the inputs."""

    def run(function, *inputs, dynamic=None):
        return find_projections(capture(function, *inputs, W, dynamic=dynamic)[0])

    return run


def plain(x, w):
    return linear(x, w)


def flattened(x, w):
    return linear((x + 1).view(-1, 16), w)


def split_by_heads(x, w):
    return linear(x.view(x.shape[0], x.shape[1], 2, 8).flatten(2), w)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("function", "shape", "phase"),
    [
        (plain, (2, 4, 16), "prefill"),
        (plain, (1, 2, 16), "prefill"),
        (plain, (2, 1, 16), "decode"),
        (plain, (1, 1, 16), "decode"),
        (plain, (64, 1, 16), "decode"),
        (plain, (4, 16), "unknown"),
        (plain, (1, 16), "unknown"),
        (plain, (16,), "unknown"),
        (plain, (2, 3, 4, 16), "unknown"),
        (flattened, (2, 4, 16), "prefill"),
        (flattened, (2, 1, 16), "decode"),
        (split_by_heads, (2, 4, 16), "prefill"),
    ],
)
def test_phase(projections, function, shape, phase, dynamic):
    assert classify_phase(projections(function, torch.randn(shape), dynamic=dynamic)) == phase


def test_a_graph_without_projections():
    assert classify_phase([]) == "unknown"


def test_the_first_that_shows_a_sequence_votes(projections):
    def last_token_only(x, w):
        return linear(linear(x, w)[:, -1:], w)

    assert classify_phase(projections(last_token_only, torch.randn(2, 4, 16))) == "prefill"


def test_a_flat_one_before_it_does_not(projections):
    def flat_first(rows, x, w):
        return linear(rows, w), linear(x, w)

    found = projections(flat_first, torch.randn(8, 16), torch.randn(2, 1, 16))
    assert classify_phase(found) == "decode"


def test_a_transpose_is_no_view_of_the_rows(projections):
    def turned(x, w):
        return linear(x.transpose(0, 1).reshape(-1, 16), w)

    (one,) = projections(turned, torch.randn(2, 4, 16))
    origin, *_ = reshapes_of(one.x)
    assert "transpose" in origin.name  # rows of another order end the walk
    assert tuple(origin.meta["example_value"].shape) == (4, 2, 16)


def test_a_reshape_of_the_channels_ends_the_walk(projections):
    def regrouped(x, w):
        return linear(x.view(-1, 16), w)

    (one,) = projections(regrouped, torch.randn(2, 4, 32))
    assert reshapes_of(one.x) == [one.x]
    assert classify_phase([one]) == "unknown"


def test_every_reshape_on_the_way_is_returned(projections):
    def twice(x, w):
        return linear((x + 1).view(2, 2, 2, 16).flatten(0, 2).contiguous(), w)

    (one,) = projections(twice, torch.randn(2, 4, 16))
    assert [node.target for node in reshapes_of(one.x)][1:] == ["view", "flatten", "contiguous"]


# ---- tokens ----


def test_tokens_of_fixed_sizes(projections):
    found = projections(lambda x, w: linear(linear(x, w)[:, -1], w), torch.randn(2, 4, 16))
    assert fixed_tokens(found) == 8
    assert token_hints(found) == [8, 2]


def test_tokens_of_symbolic_sizes(projections):
    found = projections(plain, torch.randn(2, 4, 16), dynamic=True)
    assert fixed_tokens(found) is None
    assert token_hints(found) == [8]


def test_asking_puts_no_guard_on_the_sizes(capture):
    gm, _ = capture(plain, torch.randn(2, 4, 16), W, dynamic=True)
    (one,) = find_projections(gm)
    environment = one.x.meta["example_value"].shape[0].node.shape_env
    before = len(environment.guards)
    assert classify_phase([one]) == "prefill"
    fixed_tokens([one])
    token_hints([one])
    assert len(environment.guards) == before


def test_a_single_row_has_one_token(projections):
    found = projections(plain, torch.randn(16))
    assert fixed_tokens(found) == 1
