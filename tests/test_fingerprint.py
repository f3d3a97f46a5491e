"""A fingerprint changes with the values of a weight, counted by PyTorch or not."""

import pytest
import torch
from torch import nn

from amber_compile.derivations import ScoreFactor
from amber_compile.derived import derive
from amber_compile.fingerprint import fingerprint
from amber_compile.stand_in import empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FACTOR = ScoreFactor("weight_norm")


def new_weight(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(64, 128, dtype=dtype))


def merge(weight: nn.Parameter, delta: torch.Tensor) -> None:
    """Add ``delta`` as PEFT does, unseen."""
    before = weight._version, weight.data_ptr()
    weight.data += delta
    assert (weight._version, weight.data_ptr()) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_that_is_merged_changes_it_and_is_unmerged(dtype: torch.dtype) -> None:
    weight = new_weight(dtype)
    before = fingerprint(weight)
    kept = weight.detach().clone()
    merge(weight, torch.full_like(weight, 0.125))
    assert fingerprint(weight) != before
    weight.data.copy_(kept)
    assert fingerprint(weight) == before


def test_no_column_of_a_square_matrix_escapes() -> None:
    weight = nn.Parameter(torch.zeros(256, 256))
    before = fingerprint(weight)
    for column in range(256):
        weight.data[:, column] += 1
        assert fingerprint(weight) != before
        weight.data[:, column] -= 1


@pytest.mark.parametrize("change", [torch.Tensor.t, torch.clone, torch.detach])
def test_it_is_of_the_values_as_they_are_laid_out(change) -> None:
    weight = new_weight()
    same = torch.equal(change(weight).flatten(), weight.flatten())
    assert (fingerprint(change(weight).detach()) == fingerprint(weight)) == same


def test_what_has_no_values_of_its_own_has_none() -> None:
    assert fingerprint(torch.empty(4, 4, device="meta")) == 0
    assert fingerprint(torch.empty(0)) == fingerprint(torch.empty(0, 4))


def test_who_asks_after_a_merge_gets_what_follows_from_the_merged_weight() -> None:
    weight = new_weight()
    before = derive(weight, FACTOR)
    assert derive(weight, FACTOR) is before
    merge(weight, torch.randn_like(weight))
    assert derive(weight, FACTOR, look=False) is before
    merged = derive(weight, FACTOR)
    assert torch.equal(merged, FACTOR.compute(weight))
    assert not torch.equal(merged, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_into_a_released_weight_leaves_a_trace(dtype: torch.dtype) -> None:
    weight = new_weight(dtype)
    empty(weight)
    before = fingerprint(weight)
    assert fingerprint(weight) == before
    merge(weight, torch.ones_like(weight))
    assert weight.isnan().all()
    assert fingerprint(weight) != before
