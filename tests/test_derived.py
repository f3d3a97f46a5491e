"""Factors: computed once per weight, valid until it is written to, gone when it is."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from amber_compile.derivations import Matrix, ScoreFactor
from amber_compile.derived import derive
from amber_compile.errors import OptionError
from amber_compile.scores import robust_norm, weight_norm


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


def test_a_factor_is_computed_once(weight: torch.Tensor) -> None:
    assert derive(weight, ScoreFactor("weight_norm")) is derive(weight, ScoreFactor("weight_norm"))


def test_each_score_orientation_and_part_has_its_own_factor(weight: torch.Tensor) -> None:
    square = weight[:64]
    assert torch.equal(derive(square, ScoreFactor("weight_norm")), weight_norm(square))
    assert torch.equal(derive(square, ScoreFactor("robust_norm")), robust_norm(square))
    assert torch.equal(
        derive(square, ScoreFactor("weight_norm", Matrix(True))), weight_norm(square.T)
    )
    assert torch.equal(
        derive(square, ScoreFactor("weight_norm", Matrix(False, 0, 16))), weight_norm(square[:16])
    )
    assert torch.equal(derive(square, ScoreFactor("weight_norm")), weight_norm(square))


def test_rows_are_outputs_however_the_weight_is_stored(weight: torch.Tensor) -> None:
    factor = derive(weight.T.contiguous(), ScoreFactor("weight_norm", Matrix(True, 0, 48)))
    assert torch.equal(factor, weight_norm(weight[:48]))


def test_experts_have_a_factor_each() -> None:
    experts = torch.randn(3, 32, 64)
    rows = [weight_norm(expert) for expert in experts]
    assert torch.equal(derive(experts, ScoreFactor("weight_norm")), torch.stack(rows))
    stored = experts.transpose(1, 2).contiguous()
    assert torch.equal(derive(stored, ScoreFactor("weight_norm", Matrix(True))), torch.stack(rows))


def test_a_write_makes_a_new_factor(weight: torch.Tensor) -> None:
    before = derive(weight, ScoreFactor("weight_norm"))
    weight[:, 0] *= 100
    after = derive(weight, ScoreFactor("weight_norm"))
    assert torch.equal(after, weight_norm(weight))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_factor_may_enter_any_graph_whatever_mode_it_was_made_in(
    mode: Callable[[], torch.inference_mode | torch.no_grad], weight: torch.Tensor
) -> None:
    with mode():
        factor = derive(torch.nn.Parameter(weight), ScoreFactor("weight_norm"))
    assert not factor.is_inference()
    assert not factor.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_factors_are_fp32(dtype: torch.dtype, weight: torch.Tensor) -> None:
    assert derive(weight.to(dtype), ScoreFactor("weight_norm")).dtype == torch.float32


def test_a_weight_without_a_factor_leaves_nothing_behind(weight: torch.Tensor) -> None:
    weight[3, 5] = torch.nan
    with pytest.raises(OptionError, match=r"not finite in 1 of 64 .* channel 5"):
        derive(weight, ScoreFactor("weight_norm"))
    weight[3, 5] = 0
    assert torch.equal(derive(weight, ScoreFactor("weight_norm")), weight_norm(weight))


def test_factors_die_with_their_weight(weight: torch.Tensor) -> None:
    factor = weakref.ref(derive(weight.clone(), ScoreFactor("weight_norm")))
    gc.collect()
    assert factor() is None
