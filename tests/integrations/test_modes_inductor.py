"""Inductor's modes, and the switches of ``torch.compile`` that a server turns: the same answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import OPTIONS, X
from stack import Stack, sparse
from torch import Tensor, nn

from amber_compile import derived, last_reports
from amber_compile.config import MODES
from amber_compile.derivations import ScoreFactor

LONG = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, **how: Any) -> Callable[[Tensor], Tensor]:
    how = {"backend": "amber_eager", "options": OPTIONS} | how
    return torch.no_grad()(torch.compile(model, **how))


# ---- modes ----


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_bits_of_every_other(mode: str, inductor: None) -> None:
    options = OPTIONS | {"mode": mode}
    assert torch.equal(compiled(Stack(), backend="amber", options=options)(X), sparse(Stack(), X))
    assert last_reports()[0].graphs[0].fallback is None


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "lite"])
def test_mode_is_told_in_either_way(mode: str, inductor: None) -> None:
    by_option = compiled(Stack(), backend="amber", options={"mode": mode})(X)
    torch._dynamo.reset()
    assert torch.equal(compiled(Stack(), backend="amber", mode=mode, options=None)(X), by_option)
    assert {report.coverage for report in last_reports()} == {2 / 3}


@pytest.mark.parametrize("mode", ["max-autotune", "lite"])
def test_eight_bits_and_corrections_are_the_same_in_every_mode(mode: str, inductor: None) -> None:
    expected = compiled(Stack(), options={"quantize": "int8"})(X)
    options = {"quantize": "int8", "mode": mode}
    assert torch.equal(compiled(Stack(), backend="amber", options=options)(X), expected)


# ---- stances ----


def test_eager_is_dense_and_afterwards_the_graph_is_still_there() -> None:
    stack = Stack()
    run = compiled(stack)
    run(X)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(run(X), stack(X))
    assert torch.equal(run(X), sparse(stack, X))
    assert len(last_reports()) == 1


def test_no_graph_is_compiled_where_that_is_forbidden() -> None:
    stack = Stack()
    run = compiled(stack, dynamic=False)
    run(X)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(X), sparse(stack, X))
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            run(LONG)
    with torch.no_grad(), torch.compiler.set_stance("eager_on_recompile"):
        assert torch.equal(run(LONG), stack(LONG))
    assert len(last_reports()) == 1


def test_another_backend_may_be_forced() -> None:
    stack = Stack()
    run = compiled(stack)
    with torch.no_grad(), torch.compiler.set_stance(force_backend="eager"):
        assert torch.equal(run(X), stack(X))
    assert not last_reports()


# ---- reset ----


def test_after_a_reset_the_graph_is_compiled_anew_from_what_was_derived() -> None:
    stack = Stack()
    run = compiled(stack)
    run(X)
    weight, request = stack.layers[0].gate_proj.weight, ScoreFactor("weight_norm")
    factor = derived.derive(weight, request)
    torch.compiler.reset()
    assert torch.equal(run(X), sparse(stack, X))
    assert len(last_reports()) == 2
    assert derived.derive(weight, request) is factor


# ---- lengths ----


def test_one_dynamic_graph_serves_every_length_but_one() -> None:
    stack = Stack()
    run = compiled(stack, dynamic=True)
    for length in (5, 24, 3, 17, 8):
        x = LONG[:, :length].contiguous()
        assert torch.equal(run(x), sparse(stack, x))
    assert len(last_reports()) == 1
    one = LONG[:, :1].contiguous()
    with torch.no_grad():
        assert torch.equal(run(one), stack(one))
    assert [report.graphs[0].phase for report in last_reports()] == ["prefill", "decode"]


def test_past_the_recompile_limit_calls_are_dense_and_unreported() -> None:
    """The trap: Dynamo gives up on the function, and only its log says so."""
    stack = Stack()
    run = compiled(stack, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (5, 6):
            x = LONG[:, :length].contiguous()
            assert torch.equal(run(x), sparse(stack, x))
        x = LONG[:, :7].contiguous()
        with torch.no_grad():
            assert torch.equal(run(x), stack(x))
    assert len(last_reports()) == 2


def test_the_recompile_limit_may_be_an_error() -> None:
    run = compiled(Stack(), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        run(X)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run(LONG)
