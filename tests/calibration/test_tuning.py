"""Tuning follows the model's own gradient, alone or on several ranks, and can be interrupted."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from toy import SITES, Toy, text, tune_as_rank

from amber_compile.calibration.errors import CalibrationError
from amber_compile.calibration.observe import observing, weights_of
from amber_compile.calibration.reading import Reader
from amber_compile.calibration.resume import Checkpoint
from amber_compile.calibration.selection import Sparse
from amber_compile.calibration.tuned import Tuned
from amber_compile.calibration.tuning import Tuning, tune
from amber_compile.calibration.validation import distances
from amber_compile.errors import OptionError
from amber_compile.settings import Settings

HALF = Sparse(Settings("2:4", "magnitude"))
CASE = dict.fromkeys(SITES, HALF)


def tuned(model: torch.nn.Module, tuning: Tuning, folder: Path | None = None, case=CASE):
    reader = Reader(model, Checkpoint(folder, {}), progress=False)
    batches = list(enumerate(text()))
    return tune(reader, weights_of(model, SITES), case, batches, tuning)


def damage(model: torch.nn.Module, case, batches: list) -> float:
    reader = Reader(model, Checkpoint(None, {}), progress=False)
    held = list(enumerate(batches))
    return distances(reader, weights_of(model, SITES), {"": case}, held, "", "")[""].mean


@pytest.mark.parametrize("tunes", [("output",), ("weight",), ("output", "weight")])
@pytest.mark.parametrize("logits", [True, False])
def test_other_text_is_answered_better(tunes: tuple[str, ...], logits: bool) -> None:
    model, other = Toy(bias=True, logits=logits), text(seed=9)
    found = tuned(model, Tuning(tunes, steps=40, tokens=48))
    assert damage(model, found, other) < damage(model, CASE, other)
    for sparse in found.values():
        assert sparse.settings.output_scale == sparse.settings.output_bias == ("output" in tunes)
        assert sparse.settings.updated_weight == ("weight" in tunes)
        assert {value.dtype for value in sparse.tensors.values()} == {torch.float32}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_product_s_gradient_is_that_of_its_formula() -> None:
    model, name = Toy(bias=True), "layers.1.down_proj"
    state = Tuned({name: HALF}, ("output_scale", "output_bias"))
    linear, rows = model.get_submodule(name), []

    def visit(call):
        state.meet(call, call())
        rows.append(call.rows.detach())
        return state.product(call)

    with observing({name: linear.weight}, visit):
        answer = linear(torch.randn(3, 32))
    scale, bias = state.values.values()
    slopes = torch.randn_like(answer)
    by_scale, by_bias = torch.autograd.grad((answer * slopes).sum(), (scale, bias))
    y = linear(torch.ops.amber.nm_select(rows[0], None, 2, 4))
    assert torch.equal(by_scale, (y * slopes).sum(0))
    assert torch.equal(by_bias, slopes.sum(0))


def test_experts_and_halves_stay_as_they_are() -> None:
    half = Sparse(Settings("2:4", "magnitude", part="gate"))
    assert tuned(Toy(), Tuning(steps=2, tokens=24), case={SITES[1]: half}) == {SITES[1]: half}


def test_an_interrupted_tuning_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model = Toy()
    whole = tuned(model, Tuning(steps=20, tokens=24))
    model.forward, read = _failing(model, after=1 + 2 * 14), model.forward
    with pytest.raises(RuntimeError):
        tuned(model, Tuning(steps=20, tokens=24), tmp_path)
    model.forward = _failing(model, after=1 + 2 * 10, forward=read)
    again = tuned(model, Tuning(steps=20, tokens=24), tmp_path)  # ten steps were kept, ten are left
    for name in SITES:
        for key, value in whole[name].tensors.items():
            assert torch.equal(value, again[name].tensors[key])


def _failing(model, after: int, forward=None):
    forward, calls = forward or model.forward, iter(range(after))

    def limited(*args, **kwargs):
        if next(calls, None) is None:
            raise RuntimeError
        return forward(*args, **kwargs)

    return limited


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)
def test_ranks_take_the_steps_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(tune_as_rank, (2, str(tmp_path)), nprocs=2)
    alone = tuned(Toy(), Tuning(steps=4, tokens=48))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in SITES:
        for key, value in alone[name].tensors.items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key])
            # two batches' gradients are added in another order: Adam's first steps have the
            # size of the rate whatever the gradient's, so rounding moves them by a share of it
            assert (ranks[0][name][key] - value).abs().max() < 4 * 0.01 * 2.0**-10


def test_an_answer_that_is_not_finite_is_refused() -> None:
    model = Toy()
    with torch.no_grad():
        model.embed.weight[3] = torch.nan
    with pytest.raises(CalibrationError, match=r"gradient of layers\.0\.q_proj"):
        tuned(model, Tuning(steps=2, tokens=24))


@pytest.mark.parametrize("wrong", [{"tunes": ("factor",)}, {"steps": 0}, {"tokens": 1.5}])
def test_wrong_options_are_named(wrong: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Tuning(**wrong)


def test_rates_fall_from_one_to_nothing() -> None:
    rates = [Tuning(steps=10).rate(step) for step in range(10)]
    assert rates[0] == 1
    assert all(late < early for early, late in itertools.pairwise(rates))
    assert math.isclose(Tuning(steps=10).rate(5), 0.5)
