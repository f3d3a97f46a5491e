"""Weights that are written to, replaced, shared between threads, or gone."""

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from stack import Stack, sparse
from torch import Tensor, nn

from amber_compile import derived, last_reports, refresh
from amber_compile.binding import Binding, Derived, Variant
from amber_compile.derivations import ScoreFactor

OPTIONS = {"correction": None}
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


def compiled(stack: nn.Module, **options: object) -> Callable[[Tensor], Tensor]:
    run = torch.compile(stack, backend="amber_eager", options=OPTIONS | options)
    return torch.no_grad()(run)


# ---- writes ----


def add(stack: Stack) -> None:
    with torch.no_grad():
        for weight in stack.parameters():
            weight.add_(torch.randn_like(weight))


def copy(stack: Stack) -> None:
    with torch.no_grad():
        for weight in stack.parameters():
            weight.copy_(torch.randn_like(weight))


def load(stack: Stack, assign: bool) -> None:
    stack.load_state_dict(Stack(seed=1).state_dict(), assign=assign)


def set_data(stack: Stack) -> None:
    for weight in stack.parameters():
        weight.data = torch.randn_like(weight)


def step(stack: Stack) -> None:
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    stack(X).sum().backward()
    optimizer.step()


def replace(stack: Stack) -> None:
    for layer in stack.layers:
        layer.gate_proj.weight = nn.Parameter(torch.randn_like(layer.gate_proj.weight))
        layer.down_proj = nn.Linear(96, 64, bias=False)


WRITES = [add, copy, partial(load, assign=False), partial(load, assign=True)]
WRITES += [set_data, step, replace]
IDS = ["add_", "copy_", "load_state_dict", "assign", "data", "SGD", "new parameters"]


@pytest.mark.parametrize("write", WRITES, ids=IDS)
def test_a_written_weight_has_a_new_factor(write: Callable[[Stack], None]) -> None:
    stack = Stack()
    run = compiled(stack)
    before = run(X)
    write(stack)
    assert not torch.equal(run(X), before)
    assert torch.equal(run(X), sparse(stack, X))
    assert len(last_reports()) == 1


def add_to_data(stack: Stack) -> None:
    for weight in stack.parameters():
        weight.data.mul_(torch.linspace(0.1, 3, weight.shape[1]))


def fused_step(stack: Stack) -> None:
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.3, fused=True)
    stack(X).square().sum().backward()
    optimizer.step()


def write_by_numpy(stack: Stack) -> None:
    for weight in stack.parameters():
        weight.detach().numpy()[:] *= torch.linspace(0.1, 3, weight.shape[1]).numpy()


@pytest.mark.parametrize("write", [add_to_data, fused_step, write_by_numpy])
def test_a_write_behind_pytorchs_back_is_seen_after_refresh(
    write: Callable[[Stack], None],
) -> None:
    stack = Stack()
    run = compiled(stack)
    run(X)
    write(stack)
    assert not torch.equal(run(X), sparse(stack, X))  # the limitation that refresh() is for
    refresh(stack)
    assert torch.equal(run(X), sparse(stack, X))


def test_refresh_takes_the_compiled_model_too_and_reaches_weights_that_are_buffers() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q_proj", torch.randn(32, 64))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.q_proj)

    model = Buffered()
    run = torch.compile(model, backend="amber_eager", options=OPTIONS | {"strict": True})
    with torch.no_grad():
        before = run(X)
        model.q_proj.data.mul_(torch.linspace(0.1, 3, 64))
        stale = run(X)
        refresh(run)
        assert last_reports()[0].sites[0].decision.sparse
        assert not torch.equal(stale, before)
        assert not torch.equal(run(X), stale)


def test_refresh_takes_nothing_but_modules() -> None:
    with pytest.raises(TypeError, match="not Tensor"):
        refresh(torch.ones(2))  # type: ignore[arg-type]  # the point


def test_weights_made_in_inference_mode_run() -> None:
    with torch.inference_mode():
        stack = Stack()
        run = torch.compile(stack, backend="amber_eager", options=OPTIONS)
        assert torch.equal(run(X), sparse(stack, X))
        stack.layers[0].gate_proj.weight.mul_(torch.linspace(0.1, 3, 64))
        refresh(stack)  # such a weight counts no writes
        assert torch.equal(run(X), sparse(stack, X))


# ---- weights that cannot be scored ----


def test_a_weight_that_becomes_infinite_runs_dense_until_it_is_finite_again() -> None:
    stack = Stack()
    run = compiled(stack)
    run(X)
    weight = stack.layers[1].gate_proj.weight
    with torch.no_grad():
        weight[0, 3] = torch.inf
    with pytest.warns(UserWarning, match="not finite in 1 of 64 .* first in channel 3"):
        result = run(X)
    with torch.no_grad():
        torch.testing.assert_close(result, stack(X), rtol=0, atol=0, equal_nan=True)
        run(X)  # warns no more
        weight[0, 3] = 1.0
    assert torch.equal(run(X), sparse(stack, X))


# ---- threads ----


def in_threads(work: list[Callable[[], None]]) -> None:
    """Run every job in a thread of its own, all at once; raise what one of them raised."""
    start = threading.Barrier(len(work))
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        start.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_eight_threads_may_call_first_at_once_and_with_mixed_lengths() -> None:
    stack = Stack()
    run = compiled(stack)

    def call(length: int) -> None:
        x = torch.randn(2, length, 64)
        for _ in range(3):
            assert torch.equal(run(x), sparse(stack, x))

    in_threads([partial(call, length) for length in (8, 8, 5, 5, 13, 16, 8, 21)])


def test_threads_that_bind_at_once_share_one_factor() -> None:
    variant = Variant(lambda weight, factor: factor, (Derived(0, ScoreFactor("weight_norm")),))
    binding = Binding([0], lambda weights: variant, dense=lambda weight: None)
    weight = torch.randn(64, 64)
    results: list[Tensor] = []
    in_threads([lambda: results.append(binding(weight))] * 8)
    assert len({id(result) for result in results}) == 1


# ---- lifetime ----


def test_nothing_keeps_a_deleted_model_alive() -> None:
    others = len(derived._derived)  # of models that pytest's log of an earlier test still holds
    stack = Stack()
    run = compiled(stack, check=True)
    run(X)
    reports = last_reports()
    weights = [weakref.ref(weight) for weight in stack.parameters()]
    del stack, run
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)
    assert len(derived._derived) <= others
    assert reports[0].coverage > 0


def test_a_binding_forgets_weights_that_are_gone() -> None:
    variant = Variant(lambda weight, factor: factor, (Derived(0, ScoreFactor("weight_norm")),))
    binding = Binding([0], lambda weights: variant, dense=lambda weight: None)
    weight = torch.randn(64, 64)
    binding(weight)
    assert len(binding._bound) == 1
    del weight
    gc.collect()
    assert not binding._bound


def test_weights_do_not_keep_a_dropped_binding_alive() -> None:
    variant = Variant(lambda weight, factor: factor, (Derived(0, ScoreFactor("weight_norm")),))
    binding = Binding([0], lambda weights: variant, dense=lambda weight: None)
    weight = torch.randn(64, 64)
    binding(weight)
    gone = weakref.ref(binding)
    del binding
    assert gone() is None


def test_one_layer_replaced_many_times_leaves_one_entry() -> None:
    variant = Variant(lambda a, b, factor: factor, (Derived(1, ScoreFactor("weight_norm")),))
    binding = Binding([0, 1], lambda weights: variant, dense=lambda a, b: None)
    constant = torch.randn(64, 64)
    for _ in range(5):
        binding(constant, torch.randn(64, 64))
    gc.collect()
    assert not binding._bound
    assert weakref.getweakrefcount(constant) == 0
