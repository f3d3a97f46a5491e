"""The training script: it learns, resumes, repeats by its seed, and leaves a model behind."""

import json
import math
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
import train_python_lm
from python_corpus import Document
from python_tokens import CONTEXT, VOCABULARY
from torch import Tensor
from train_python_lm import Recipe, Run, batches, new_model, optimizers_for, train, train_step
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return new_model(width=128, layers=1)


@pytest.fixture
def tokens() -> Tensor:
    """Eight sequences of 64 tokens."""
    return torch.randint(VOCABULARY, (8, 64), generator=torch.manual_seed(0))


def test_a_step_lowers_the_loss(tiny: LlamaForCausalLM, tokens: Tensor) -> None:
    optimizers = optimizers_for(tiny, Recipe(steps=1))
    losses = [train_step(tiny, optimizers, tokens) for _ in range(3)]
    assert math.log(VOCABULARY) + 0.5 > losses[0] > losses[1] > losses[2]


def test_every_parameter_has_one_optimizer(tiny: LlamaForCausalLM) -> None:
    muon, adamw = optimizers_for(tiny, Recipe())
    parameters = [
        parameter
        for optimizer in (muon, adamw)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert Counter(map(id, parameters)) == Counter(map(id, tiny.parameters()))


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    recipe = Recipe(steps=4)

    def run_to(step: int, *, resume: bool) -> Run:
        torch.manual_seed(0)
        run = Run(new_model(width=128, layers=1), recipe)
        if resume:
            run.load(tmp_path / "checkpoint.pt")
        train(run, islice(tokens.split(2), step), recipe, tmp_path / "checkpoint.pt")
        return run

    whole = run_to(4, resume=False)
    run_to(2, resume=False)
    resumed = run_to(4, resume=True)
    assert whole.step == resumed.step == 4
    for expected, actual in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_the_script_leaves_a_model_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [Document(f"{i}.py", "def f(self):\n    return self.f\n" * 500) for i in range(2)]
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(train_python_lm, "documents", lambda split: few)
    monkeypatch.setattr(train_python_lm, "new_model", partial(new_model, width=128, layers=1))
    monkeypatch.setattr("sys.argv", ["train_python_lm.py", "--steps=1", f"--out={tmp_path}"])
    train_python_lm.main()
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["steps"] == 1
    assert report["heldout_bf16"] == pytest.approx(report["heldout_fp32"], rel=0.01)
    AutoTokenizer.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_batches_repeat_by_seed_and_skip_most_tests() -> None:
    docs = [Document(f"{name}/{i}.py", "") for i in range(64) for name in ("test", "json")]
    tokens = [[int(doc.is_test_or_table)] * CONTEXT for doc in docs]

    def epoch(seed: int) -> Tensor:
        return torch.cat(list(islice(batches(docs, tokens, Recipe(seed=seed)), 8)))

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))
    assert (epoch(0) == 0).all(dim=1).sum() > 48


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100)
    rates = [recipe.rate_at(recipe.spent(step, 0.0)) for step in range(101)]
    assert rates.index(max(rates)) == 2
    assert rates[0] < recipe.rate / 10
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < recipe.rate * 1e-9
    assert Recipe(minutes=2).spent(10_000, 60.0) == 0.5
