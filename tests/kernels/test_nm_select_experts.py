"""Rows grouped by expert: each group is selected by the factor of its own expert."""

import pytest
import torch

from amber_compile.errors import OptionError
from amber_compile.kernels import nm_select

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("correction", [None, "norm"])
def test_each_expert_selects_as_it_would_alone(select, assert_same_bits, dtype, correction):
    x, factor = torch.randn(40, 64).to(dtype), torch.rand(4, 64)
    ends = [7, 7, 30, 40]  # the second expert has no rows
    together = select(x, factor, 2, 4, correction, offsets=int32(*ends))
    groups = zip([0, *ends], ends, factor, strict=False)
    alone = [
        select(x[start:end], one, 2, 4, correction) for start, end, one in groups if end > start
    ]
    assert_same_bits(together, torch.cat(alone))


def test_experts_of_different_factors_keep_different_channels(select):
    x = torch.ones(2, 4)
    factor = torch.tensor([[9.0, 9.0, 1.0, 1.0], [1.0, 1.0, 9.0, 9.0]])
    kept = select(x, factor, 2, 4, offsets=int32(1, 2))
    assert kept.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_rows_behind_the_last_end_count_with_the_last_expert(select, assert_same_bits):
    x, factor = torch.randn(6, 32), torch.rand(2, 32)
    kept = select(x, factor, 2, 4, offsets=int32(2, 4))
    assert_same_bits(kept[4:], select(x[4:], factor[1], 2, 4))


def test_opcheck_accepts_experts():
    arguments = (torch.randn(6, 32), torch.rand(2, 32), 2, 4, None, 0, 0, int32(2, 6))
    torch.library.opcheck(torch.ops.amber.nm_select.default, arguments)


@pytest.mark.parametrize(
    ("x", "factor", "offsets", "message"),
    [
        ((4, 8), (8,), int32(4), r"factor has shape \[8\]; valid with offsets: \[experts, 8\]"),
        ((4, 8), (2, 4), int32(2, 4), r"factor has shape \[2, 4\]"),
        ((2, 4, 8), (2, 8), int32(2, 4), r"x has shape \[2, 4, 8\]; valid with offsets"),
        ((4, 8), (2, 8), int32(4), r"valid: torch.int32 \[2\]"),
        ((4, 8), (2, 8), torch.tensor([2, 4]), r"offsets are torch.int64"),
        ((4, 8), (2, 8), None, r"factor has shape \[2, 8\]; valid: \[8\]"),
    ],
)
def test_refuses_factors_and_offsets_that_do_not_fit(x, factor, offsets, message):
    with pytest.raises(OptionError, match=message):
        nm_select(torch.randn(x), torch.rand(factor), 2, 4, offsets=offsets)


def test_refuses_offsets_without_a_factor():
    with pytest.raises(OptionError, match="offsets tell the rows of each expert's factor"):
        nm_select(torch.randn(4, 8), None, 2, 4, offsets=int32(2, 4))
