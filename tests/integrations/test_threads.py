"""Serving from several threads: no race, no recompile storm, the bits of one thread."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from stack import Stack, sparse
from torch import Tensor, nn
from zoo import ZOO

import amber_compile
from amber_compile import derived, last_reports, refresh
from amber_compile.binding import Binding, Derived, Variant
from amber_compile.derivations import Names, ScoreFactor

OPTIONS = {"correction": None}
LENGTHS = (7, 32, 1, 1, 16, 17, 3, 24)  # 1: decode
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def impatient() -> Iterator[None]:
    """Let threads take turns a thousand times as often, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run every job in a thread of its own, all at once; raise what one of them raised."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [done.result() for done in [pool.submit(run, job) for job in jobs]]


# ---- one model, eight threads ----


@torch.no_grad()
def test_eight_threads_of_mixed_lengths_share_one_graph_and_change_no_bit() -> None:
    stack = Stack()
    run = torch.compile(stack, backend="amber_eager", dynamic=True, options=OPTIONS)
    inputs = [torch.randn(2, length, 64) for length in (8, 5, 13, 16, 3, 21, 33, 40)]
    alone = [run(x) for x in inputs]  # the warm-up
    assert all(map(torch.equal, alone, [sparse(stack, x) for x in inputs]))

    @torch.no_grad()  # of this thread only
    def serve(first: int) -> None:
        for at in range(40):
            at = (first + at) % len(inputs)
            assert torch.equal(run(inputs[at]), alone[at])

    with torch.compiler.set_stance("fail_on_recompile"):
        at_once(*[partial(serve, first) for first in range(8)])
    assert len(last_reports()) == 1


@torch.no_grad()
def test_a_language_model_behind_a_lock_answers_eight_threads_with_two_graphs() -> None:
    """Threads disturb Dynamo's search among several graphs of one function, with any backend."""
    model, _ = ZOO["llama"].build()
    prompts = [torch.randint(3, 96, (2, length)) for length in LENGTHS]
    model.compile(backend="amber_eager", dynamic=True)
    alone = [model(prompt, use_cache=False).logits for prompt in prompts]
    phases = [report.graphs[0].phase for report in last_reports()]
    assert sorted(phases) == ["decode", "prefill"]
    one_at_a_time = threading.Lock()

    @torch.no_grad()
    def serve(first: int) -> None:
        for at in range(len(prompts)):
            at = (first + at) % len(prompts)
            with one_at_a_time:
                logits = model(prompts[at], use_cache=False).logits
            assert torch.equal(logits, alone[at])

    with torch.compiler.set_stance("fail_on_recompile"):
        at_once(*[partial(serve, first) for first in range(8)])
    assert len(last_reports()) == 2


@torch.no_grad()
def test_threads_that_call_first_at_once_compile_what_they_would_without_amber() -> None:
    """Dynamo does not look again once it has waited for another thread: warm up in one thread."""
    stack = Stack()
    graphs: list[torch.fx.GraphModule] = []

    def count(gm: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    inputs = [torch.randn(2, length, 64) for length in range(8, 12)]
    plain = torch.compile(stack, backend=count, dynamic=True)
    at_once(*[torch.no_grad()(partial(plain, x)) for x in inputs])
    torch._dynamo.reset()
    run = torch.compile(stack, backend="amber_eager", dynamic=True, options=OPTIONS)
    results = at_once(*[torch.no_grad()(partial(run, x)) for x in inputs])
    assert all(map(torch.equal, results, [sparse(stack, x) for x in inputs]))
    assert len(graphs) > 1
    assert 1 <= len(last_reports()) <= len(inputs)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older ones have one for all threads")
def test_a_thread_has_a_configuration_of_its_own() -> None:
    """The trap: what the main thread sets does not reach the threads of a pool."""
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=limit + 1):
        assert at_once(lambda: torch._dynamo.config.recompile_limit) == [limit]


def test_a_thread_has_a_grad_mode_of_its_own() -> None:
    """The trap: ``no_grad`` around the server does not reach the threads that answer."""
    stack = Stack()
    run = torch.compile(stack, backend="amber_eager", options=OPTIONS)
    with torch.no_grad(), pytest.warns(UserWarning, match="needs gradients"):
        at_once(lambda: run(X))
    with torch.no_grad():
        assert torch.equal(run(X), sparse(stack, X))


# ---- weights that change meanwhile ----


class Written(ScoreFactor):
    """A factor during whose computation another thread writes to the weight."""

    def compute(self, weight: Tensor) -> Tensor:
        factor = super().compute(weight)
        if weight[0, 0] != 0:
            weight.zero_()
        return factor

    def at(self, names: Names) -> "Written":
        return self


def bound(request: ScoreFactor) -> Binding:
    """Return a binding that gives back what was derived from its only argument."""
    variant = Variant(lambda weight, factor: factor, (Derived(0, request),))
    return Binding([0], lambda weights: variant, dense=lambda weight: None)


@torch.no_grad()
def test_a_write_while_a_weight_is_bound_is_seen_by_the_next_call() -> None:
    binding, weight = bound(Written("weight_norm")), torch.randn(32, 64)
    binding(weight)
    assert torch.equal(binding(weight), torch.ones(64))  # of zeros


@torch.no_grad()
def test_a_refresh_while_a_weight_is_bound_is_seen_by_the_next_call() -> None:
    class Refreshed(Written):
        def compute(self, weight: Tensor) -> Tensor:
            factor = ScoreFactor.compute(self, weight)
            if weight[0, 0] != 0:
                weight.data.zero_()  # which PyTorch does not see
                refresh(holder)
            return factor

    weight = nn.Parameter(torch.randn(32, 64))
    holder = nn.ParameterList([weight])
    binding = bound(Refreshed("weight_norm"))
    binding(weight)
    assert torch.equal(binding(weight), torch.ones(64))


@torch.no_grad()
def test_new_storage_at_an_address_that_was_in_use_before_is_noticed() -> None:
    """``p.data = ...`` twice between two calls: the second may lie where the bound one lay."""
    binding, weight = bound(ScoreFactor("weight_norm")), nn.Parameter(torch.randn(32, 64))
    memory = torch.randn(32, 64).numpy()
    weight.data = torch.from_numpy(memory)
    binding(weight)
    address = weight.data_ptr()
    weight.data = torch.randn(32, 64)
    memory[:] = 0
    weight.data = torch.from_numpy(memory)
    assert weight.data_ptr() == address
    assert torch.equal(binding(weight), torch.ones(64))
    assert torch.equal(derived.derive(weight, ScoreFactor("weight_norm")), torch.ones(64))


# ---- all at once, for a while ----


def until(end: float, job: Callable[[], object]) -> Callable[[], int]:
    """Return what does ``job`` again and again until ``end``, and tells how often."""

    @torch.no_grad()
    def work() -> int:
        times = 0
        while time.monotonic() < end:
            job()
            times += 1
        return times

    return work


@torch.no_grad()
def test_calls_writes_refreshes_and_dying_models_disturb_nobody(impatient: None) -> None:
    steady, written = Stack(0), Stack(1)
    models = [
        torch.compile(one, backend="amber_eager", options=OPTIONS) for one in (steady, written)
    ]
    expected = sparse(steady, X)
    for run in models:
        run(X)

    def serve() -> None:
        assert torch.equal(models[0](X), expected)
        models[1](X)  # while it is written to: whatever it gives

    def write() -> None:
        for weight in written.parameters():
            weight.mul_(torch.rand(weight.shape[1]) + 0.5).clamp_(-9, 9)
            weight.data = weight.clone()

    def come_and_go() -> None:
        passing = Stack(2)
        torch.compile(passing, backend="amber_eager", options=OPTIONS)(X)
        del passing
        gc.collect()

    end = time.monotonic() + 2
    jobs = [serve, serve, serve, serve, write, partial(refresh, written), come_and_go, come_and_go]
    times = at_once(*[until(end, job) for job in jobs])
    assert all(times)
    assert torch.equal(models[1](X), sparse(written, X))  # nothing stale remains
    assert len(last_reports()) == 1


@torch.no_grad()
def test_one_binding_holds_no_more_than_what_lives(impatient: None) -> None:
    binding = bound(ScoreFactor("weight_norm"))
    steady = torch.randn(16, 64)
    factor = binding(steady)

    def serve() -> None:
        assert torch.equal(binding(steady), factor)

    def replace() -> None:
        weight = torch.rand(16, 64)
        weight[:, 0] = 0  # so that its factor is known by its first channel
        assert binding(weight)[0] == 0

    end = time.monotonic() + 1
    at_once(*[until(end, job) for job in (*[serve] * 4, *[replace] * 4)])
    gc.collect()
    assert len(binding._bound) == 1


# ---- released weights ----


@torch.no_grad()
def test_a_weight_is_released_and_restored_under_eight_threads() -> None:
    stack, options = Stack(), OPTIONS | {"quantize": "int8"}
    plain = torch.compile(Stack(), backend="amber_eager", options=options)
    run = torch.compile(stack, backend="amber_eager", options=options | {"decode": "int8"})
    expected = plain(X)
    assert torch.equal(run(X), expected)
    assert stack.layers[0].gate_proj.weight.isnan().all()

    @torch.no_grad()
    def serve() -> None:
        for _ in range(20):
            assert torch.equal(run(X), expected)

    def restore() -> None:
        for _ in range(20):
            amber_compile.restore(stack)

    at_once(*[serve] * 7, restore)
    assert len(last_reports()) == 2
