"""What two models say of the same tokens: against float64, in parts, and without numbers."""

import math

import pytest
import torch
from torch import Tensor

from amber_compile.evaluation import likelihoods
from amber_compile.evaluation.likelihoods import Sums, compare

GENERATOR = torch.Generator().manual_seed(0)
DENSE, SPARSE = (3 * torch.randn(2, 6, 11, generator=GENERATOR) for _ in range(2))
TARGETS = torch.randint(11, (2, 6), generator=GENERATOR)
LIVE = torch.ones(2, 6, dtype=torch.bool)
LIVE[1, 4:] = False


def exact(dense: Tensor, sparse: Tensor, targets: Tensor, live: Tensor) -> dict[str, Tensor]:
    """Return the sums over each window, in float64."""
    p, q = dense.double().softmax(-1), sparse.double().softmax(-1)
    told = [-each.gather(-1, targets[..., None])[..., 0].log() for each in (p, q)]
    each = {
        "tokens": torch.ones_like(told[0]),
        "dense_nll": told[0],
        "sparse_nll": told[1],
        "kl": (p * (p.log() - q.log())).sum(-1),
        "top1": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    return {name: (value * live).sum(1) for name, value in each.items()}


def check(found: Sums, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=2**-18, atol=2**-18)


@pytest.mark.parametrize("chunk", [1 << 23, 22, 1])
def test_sums_over_the_live_tokens_of_each_window(monkeypatch, chunk):
    monkeypatch.setattr(likelihoods, "CHUNK", chunk)
    found = compare(DENSE, SPARSE, TARGETS, LIVE)
    check(found, exact(DENSE, SPARSE, TARGETS, LIVE))
    assert found.tokens.tolist() == [6, 4]
    assert not found.dense_bad.any()
    assert not found.sparse_bad.any()


def test_without_targets_there_are_no_losses():
    found = compare(DENSE, SPARSE, None, LIVE)
    assert not found.dense_nll.any()
    assert not found.sparse_nll.any()
    assert torch.equal(found.kl, compare(DENSE, SPARSE, TARGETS, LIVE).kl)


def test_equal_logits_are_no_difference():
    found = compare(DENSE, DENSE, TARGETS, LIVE)
    assert not found.kl.any()
    assert torch.equal(found.dense_nll, found.sparse_nll)
    assert torch.equal(found.top1, found.tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_token_is_counted_and_makes_its_window_nan(value):
    sparse = SPARSE.clone()
    sparse[0, 2, 3] = value
    found, clean = compare(DENSE, sparse, TARGETS, LIVE), compare(DENSE, SPARSE, TARGETS, LIVE)
    assert found.sparse_bad.tolist() == [1, 0]
    assert found.dense_bad.tolist() == [0, 0]
    assert found.sparse_nll.isnan().tolist() == found.kl.isnan().tolist() == [True, False]
    assert torch.equal(found.dense_nll, clean.dense_nll)
    swapped = compare(sparse, DENSE, TARGETS, LIVE)
    assert swapped.dense_bad.tolist() == [1, 0]
    assert swapped.kl.isnan().tolist() == [True, False]


def test_bad_tokens_agree_with_nothing():
    dense = torch.full((1, 1, 4), math.nan)
    assert not compare(dense, dense, None, torch.ones(1, 1, dtype=torch.bool)).top1.any()


def test_a_token_that_is_padding_is_not_looked_at():
    sparse = SPARSE.clone()
    sparse[1, 5] = math.nan
    check(compare(DENSE, sparse, TARGETS, LIVE), exact(DENSE, SPARSE, TARGETS, LIVE))


def test_tokens_that_are_ruled_out():
    live = torch.ones(1, 1, dtype=torch.bool)
    out = torch.tensor([[[1.0, 2.0, -math.inf]]])
    both = compare(out, out, torch.tensor([[0]]), live)
    assert float(both.kl) == 0  # by both: no difference
    assert float(both.sparse_bad) == 0
    finite = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert math.isinf(float(compare(finite, out, torch.tensor([[2]]), live).kl))
    assert math.isinf(float(compare(finite, out, torch.tensor([[2]]), live).sparse_nll))
    unlikely = torch.tensor([[[300.0, 0.0, -300.0]]])  # its probability is 0 in float32
    ruled = torch.tensor([[[300.0, 0.0, -math.inf]]])
    assert float(compare(unlikely, ruled, None, live).kl) == 0
