"""Factors: computed once per weight, valid until it is written to, gone when it is."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from amber_compile.derived import score_factor
from amber_compile.errors import OptionError
from amber_compile.scores import robust_norm, weight_norm


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


def test_a_factor_is_computed_once(weight: torch.Tensor) -> None:
    assert score_factor(weight, "weight_norm") is score_factor(weight, "weight_norm")


def test_each_score_orientation_and_part_has_its_own_factor(weight: torch.Tensor) -> None:
    square = weight[:64]
    assert torch.equal(score_factor(square, "weight_norm"), weight_norm(square))
    assert torch.equal(score_factor(square, "robust_norm"), robust_norm(square))
    assert torch.equal(score_factor(square, "weight_norm", transposed=True), weight_norm(square.T))
    assert torch.equal(score_factor(square, "weight_norm", rows=16), weight_norm(square[:16]))
    assert torch.equal(score_factor(square, "weight_norm"), weight_norm(square))


def test_rows_are_outputs_however_the_weight_is_stored(weight: torch.Tensor) -> None:
    factor = score_factor(weight.T.contiguous(), "weight_norm", transposed=True, rows=48)
    assert torch.equal(factor, weight_norm(weight[:48]))


def test_experts_have_a_factor_each() -> None:
    experts = torch.randn(3, 32, 64)
    rows = [weight_norm(expert) for expert in experts]
    assert torch.equal(score_factor(experts, "weight_norm"), torch.stack(rows))
    stored = experts.transpose(1, 2).contiguous()
    assert torch.equal(score_factor(stored, "weight_norm", transposed=True), torch.stack(rows))


def test_a_write_makes_a_new_factor(weight: torch.Tensor) -> None:
    before = score_factor(weight, "weight_norm")
    weight[:, 0] *= 100
    after = score_factor(weight, "weight_norm")
    assert torch.equal(after, weight_norm(weight))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_factor_may_enter_any_graph_whatever_mode_it_was_made_in(
    mode: Callable[[], torch.inference_mode | torch.no_grad], weight: torch.Tensor
) -> None:
    with mode():
        factor = score_factor(torch.nn.Parameter(weight), "weight_norm")
    assert not factor.is_inference()
    assert not factor.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_factors_are_fp32(dtype: torch.dtype, weight: torch.Tensor) -> None:
    assert score_factor(weight.to(dtype), "weight_norm").dtype == torch.float32


def test_a_weight_without_a_factor_leaves_nothing_behind(weight: torch.Tensor) -> None:
    weight[3, 5] = torch.nan
    with pytest.raises(OptionError, match=r"not finite in 1 of 64 .* channel 5"):
        score_factor(weight, "weight_norm")
    weight[3, 5] = 0
    assert torch.equal(score_factor(weight, "weight_norm"), weight_norm(weight))


def test_factors_die_with_their_weight(weight: torch.Tensor) -> None:
    factor = weakref.ref(score_factor(weight.clone(), "weight_norm"))
    gc.collect()
    assert factor() is None
