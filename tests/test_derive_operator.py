"""amber::derive: computed once per weight and write, copied, for whoever calls."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile import refresh
from amber_compile.derivations import Matrix, Quantized, ScoreFactor, WeightCodes, WeightScale
from amber_compile.derive_operator import derive, derive_reference
from amber_compile.errors import OptionError
from amber_compile.quantization import Quantization
from amber_compile.request_text import to_text

FACTOR = ScoreFactor("weight_norm")
INT8 = Quantized(Quantization("int8"))
REQUESTS = [
    FACTOR,
    ScoreFactor("robust_norm", Matrix(True)),
    WeightCodes(INT8),
    WeightScale(Quantized(Quantization("int8"), Matrix(False, 8))),
]
KINDS = pytest.mark.parametrize("wanted", REQUESTS, ids=["factor", "robust", "codes", "scales"])


def drawn() -> torch.Tensor:
    return torch.randn(32, 16)


@pytest.fixture
def computed(monkeypatch):
    """Return the weights that a factor is computed of, as they come."""
    found = []
    compute = ScoreFactor.compute

    def counted(self, weight):
        found.append(weight)
        return compute(self, weight)

    monkeypatch.setattr(ScoreFactor, "compute", counted)
    return found


# ---- as an operator ------------------------------------------------------------------------------


@KINDS
def test_it_is_what_the_request_says(wanted):
    weight = drawn()
    answer = derive(weight, to_text(wanted))
    assert torch.equal(answer, wanted.compute(weight))
    assert torch.equal(answer, derive_reference(weight, to_text(wanted)))


@KINDS
def test_it_keeps_the_rules_of_operators(wanted):
    for weight in (drawn(), nn.Parameter(drawn())):
        tests = ["test_schema", "test_faketensor"]
        tests += [] if weight.requires_grad else ["test_aot_dispatch_dynamic"]
        torch.library.opcheck(derive, (weight, to_text(wanted)), test_utils=tests)


@KINDS
def test_a_fake_weight_gives_a_fake_answer(wanted):
    weight = drawn()
    with FakeTensorMode() as mode:
        answer = derive(mode.from_tensor(weight), to_text(wanted))
    real = derive(weight, to_text(wanted))
    assert (answer.shape, answer.dtype) == (real.shape, real.dtype)
    assert answer.stride() == real.stride()


def test_it_has_no_gradient():
    weight = nn.Parameter(drawn())
    with pytest.raises(RuntimeError, match="amber::derive is for inference only"):
        derive(weight, to_text(FACTOR)).sum().backward()


def test_a_weight_that_is_not_finite_has_none():
    weight = drawn()
    weight[1, 2] = torch.inf
    with pytest.raises(OptionError, match="finite"):
        derive(weight, to_text(FACTOR))


# ---- computed once -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_is_computed_once(computed, mode):
    weight = nn.Parameter(drawn())
    with mode():
        for _ in range(3):
            derive(weight, to_text(FACTOR))
    derive(weight, to_text(FACTOR))
    assert len(computed) == 1
    derive(weight, to_text(ScoreFactor("weight_norm", Matrix(True))))
    derive(nn.Parameter(weight.detach().clone()), to_text(FACTOR))
    assert len(computed) == 3


def test_it_is_computed_again_after_a_write(computed):
    linear = nn.Linear(16, 32)
    text = to_text(FACTOR)
    answers = [derive(linear.weight, text)]
    with torch.no_grad():
        linear.weight[:, 3] *= 2
    answers.append(derive(linear.weight, text))
    linear.weight.data[:, 4] *= 2
    assert torch.equal(derive(linear.weight, text), answers[-1])  # nobody could tell
    refresh(linear)
    answers.append(derive(linear.weight, text))
    assert len(computed) == 3
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[2], FACTOR.compute(linear.weight))


def test_codes_are_kept_with_their_weight():
    """Nothing else holds them: the answers are copies."""
    weight, text = drawn(), to_text(WeightCodes(INT8))
    calls = []
    compute = WeightCodes.compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightCodes, "compute", lambda *of: calls.append(of) or compute(*of))
        for _ in range(3):
            derive(weight, text)
            gc.collect()
    assert len(calls) == 1


def test_answers_are_copies():
    weight, text = drawn(), to_text(FACTOR)
    one, other = derive(weight, text), derive(weight, text)
    assert one.data_ptr() != other.data_ptr()
    one.zero_()
    assert torch.equal(derive(weight, text), other)


def test_an_inference_tensor_is_a_weight():
    with torch.inference_mode():
        weight = drawn()
        one = derive(weight, to_text(FACTOR))
    assert torch.equal(derive(weight, to_text(FACTOR)), one)


def test_a_dead_weight_is_forgotten():
    weight = drawn()
    derive(weight, to_text(FACTOR))
    watched = weakref.ref(weight)
    del weight
    gc.collect()
    assert watched() is None


def test_threads_share_it(computed):
    weight, text = nn.Parameter(drawn()), to_text(FACTOR)
    wanted, answers = FACTOR.compute(weight), []
    computed.clear()

    def ask() -> None:
        for _ in range(20):
            answers.append(derive(weight, text))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 160
    assert all(torch.equal(answer, wanted) for answer in answers)
    assert len(computed) == 1
