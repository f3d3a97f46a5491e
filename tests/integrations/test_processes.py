"""Other processes: forked before and after compiling, spawned, reached by pickle."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from processes import OPTIONS, X, run_script
from stack import Stack, sparse
from torch import Tensor, nn

from amber_compile import AmberConfig, Report, last_reports, register_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="waits for fork")

# ---- fork ----


@pytest.mark.slow
def test_a_forked_child_runs_what_its_parent_compiled() -> None:
    """As under gunicorn with preload: what is derived is there, and nothing is compiled again."""
    children = run_script(
        """
        model = Stack()
        run = torch.compile(model, backend="amber", dynamic=True, options={"correction": None})
        with torch.no_grad():
            run(X)

            def work():
                same = torch.equal(run(X), sparse(model, X))
                model.layers[0].gate_proj.weight.mul_(torch.linspace(0.1, 3, 64))  # its own copy
                return same, torch.equal(run(X), sparse(model, X)), len(last_reports())

            children = [answer_of_a_child(work) for _ in range(2)]
            assert torch.equal(run(X), sparse(model, X))
        print(json.dumps(children))
        """
    )
    assert children == [[True, True, 1]] * 2


def test_a_parent_that_used_threads_has_children_that_run_the_model_in_a_thread() -> None:
    """OpenMP's threads do not survive a fork. A new thread starts a team of its own."""
    answer = run_script(
        """
        torch.set_num_threads(4)
        model = Stack()
        run = torch.compile(model, backend="amber_eager", options={"correction": None})
        x = torch.randn(64, 64, 64)

        @torch.no_grad()
        def answer():
            results.append(run(x))
            return torch.equal(results[0], results[-1])

        results = []
        assert answer()

        def in_a_thread():
            told = []
            thread = threading.Thread(target=lambda: told.append(answer()))
            thread.start()
            thread.join()
            return told[0], len(last_reports())

        def on_one_thread():
            torch.set_num_threads(1)
            return answer(), len(last_reports())

        print(json.dumps([answer_of_a_child(in_a_thread), answer_of_a_child(on_one_thread)]))
        """
    )
    assert answer == [[True, 1], [True, 2]]  # Dynamo compiles anew for another number of threads


def test_a_fork_waits_for_the_thread_that_binds() -> None:
    """A lock that is held at a fork would stay held in the child for good."""
    answer = run_script(
        """
        from amber_compile.binding import Binding, Derived, Variant
        from amber_compile.derivations import ScoreFactor

        begun = threading.Event()

        class Slow(ScoreFactor):
            def compute(self, weight):
                begun.set()
                time.sleep(0.5)
                return super().compute(weight)

            def at(self, names):
                return self

        def bound(request):
            variant = Variant(lambda weight, factor: factor, (Derived(0, request),))
            return Binding([0], lambda weights: variant, dense=lambda weight: None)

        weight = torch.zeros(32, 64)
        slow, other = bound(Slow("weight_norm")), bound(ScoreFactor("weight_norm"))
        thread = threading.Thread(target=lambda: slow(weight))
        thread.start()
        begun.wait()
        work = lambda: [binding(weight).sum().item() for binding in (slow, other)]
        print(json.dumps(answer_of_a_child(work)))
        thread.join()
        """
    )
    assert answer == [64, 64]


# ---- spawn ----


@torch.no_grad()
def serve(model: nn.Module, results: "SimpleQueue[Any]") -> None:
    """Answer in a spawned process."""
    torch.set_num_threads(1)
    results.put((model(X).tolist(), len(last_reports()), last_reports()[0]))


def test_a_spawned_process_gets_a_compiled_model_and_compiles_it_there() -> None:
    stack = Stack()
    run = torch.compile(stack, backend="amber_eager", options=OPTIONS)
    with torch.no_grad():
        expected = run(X)
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=serve, args=(run, results))
    process.start()
    answer, graphs, report = results.get()
    process.join()
    assert answer == expected.tolist() == sparse(stack, X).tolist()
    assert graphs == 1
    assert str(report) == str(last_reports()[0])
    with torch.no_grad():  # the weights lie in shared memory now
        assert torch.equal(run(X), expected)


# ---- pickle ----


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy])
def test_a_copy_of_a_compiled_model_is_compiled_and_has_weights_of_its_own(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    stack = Stack()
    run = torch.compile(stack, backend="amber_eager", options=OPTIONS)
    expected = run(X)
    other = copied(run)
    assert torch.equal(other(X), expected)
    for weight in other.parameters():
        weight.mul_(torch.linspace(0.1, 3, weight.shape[1]))
    assert torch.equal(run(X), expected)
    assert torch.equal(other(X), sparse(other._orig_mod, X))
    assert not torch.equal(other(X), expected)


@torch.no_grad()
def test_a_module_compiled_in_place_arrives_uncompiled() -> None:
    """``nn.Module.compile`` is not part of what PyTorch pickles: compile where it arrives."""
    stack = Stack()
    stack.compile(backend="amber_eager", options=OPTIONS)
    expected = stack(X)
    for other in (pickled(stack), copy.deepcopy(stack)):
        assert torch.equal(other(X), Stack()(X))
        other.compile(backend="amber_eager", options=OPTIONS)
        assert torch.equal(other(X), expected)


@torch.no_grad()
def test_a_copied_layer_is_not_registered() -> None:
    model, names = Stack(), set()
    register_model(model)
    for layer in (model.layers[1], copy.deepcopy(model.layers[1])):
        layer.compile(backend="amber_eager", options=OPTIONS)
        torch._dynamo.reset()
        layer(X)
        names |= {last_reports()[-1].sites[0].name}
    assert names == {"layers.1.gate_proj", "gate_proj"}


@torch.no_grad()
@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_what_a_report_says_travels(copied: Callable[[Any], Any]) -> None:
    torch.compile(Stack(), backend="amber_eager", options={"quantize": "int8"})(X)
    report = last_reports()[0]
    other: Report = copied(report)
    assert str(other) == str(report)
    assert other.to_json() == report.to_json()
    plan = report.plan(made="here")
    assert copied(plan) == plan
    assert copied(AmberConfig(plan=plan)) == AmberConfig(plan=plan)
    assert other.plan(made="here") == plan


@torch.no_grad()
def test_the_reproducer_of_a_report_that_travelled_is_the_same(tmp_path: Path) -> None:
    torch.compile(Stack(), backend="amber_eager", options=OPTIONS)(X)
    texts: list[list[bytes]] = []
    for at, report in enumerate([last_reports()[0], pickled(last_reports()[0])]):
        folder = tmp_path / str(at)
        report.save_reproducer(folder)
        texts.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert texts[0] == texts[1]


def test_aot_compile_is_refused_by_torch() -> None:
    """``.aot_compile()`` saves the callable itself: the binding of live weights is none to save.

    PyTorch 2.11 has no such method.
    """
    refusals = (AttributeError, RuntimeError)
    run = torch.compile(Stack(), backend="amber_eager", fullgraph=True, options=OPTIONS)
    with torch.no_grad(), pytest.raises(refusals, match=r"SerializableCallable|aot_compile"):
        run.forward.aot_compile(((X,), {}))


def test_reports_hold_no_tensor() -> None:
    with torch.no_grad():
        torch.compile(Stack(), backend="amber_eager", options=OPTIONS)(X)

    class Refusing(pickle.Pickler):
        def persistent_id(self, value: Any) -> None:
            assert not isinstance(value, Tensor)

    Refusing(io.BytesIO()).dump(last_reports()[0])
