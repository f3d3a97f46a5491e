"""The adapter to lm-evaluation-harness: scores, texts, and a task that is made of local files."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import VOCAB

from amber_compile.errors import OptionError

pytest.importorskip("lm_eval")

from amber_compile.evaluation import evaluate_tasks
from amber_compile.evaluation.tasks import _harness_model, _quiet

ALL: dict[str, Any] = {"projections": ["*.layers.*"], "progress": False}


class Words:
    """A tokenizer of words ``w3 w17 ...``: the number is the token."""

    bos_token_id, eos_token_id, name_or_path = 1, 2, "words"

    def __call__(self, text: str, verbose: bool, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{token}" for token in ids)


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def words(tokens: Any) -> str:
    return " ".join(f"w{int(token)}" for token in tokens)


@pytest.fixture
def lm(llama: nn.Module) -> Any:
    """The small model, dense, for the harness."""
    with _quiet(False):
        made = _harness_model()(llama, llama, Words(), longest=64, batch=2)
    with torch.no_grad():
        yield made


def told(model: Any, tokens: list[int]) -> Tensor:
    """Return log p of each token but the first, of one text alone."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


# ---- likelihoods ---------------------------------------------------------------------------------


def test_continuations_are_scored_as_if_each_were_alone(lm: Any, llama: nn.Module) -> None:
    pairs = [([5, 6, 7], [8, 9]), ([5], [6]), ([3] * 20, [4, 5, 6]), ([9, 8], [7])]
    asked = [request(words(context), " " + words(aim)) for context, aim in pairs]
    found = lm.loglikelihood(asked)
    for (context, aim), (likely, greedy) in zip(pairs, found, strict=True):
        each = told(llama, context + aim)[-len(aim) :]
        assert likely == pytest.approx(float(each.sum()), rel=1e-4)
        logits = llama(input_ids=torch.tensor([context + aim])).logits[0, len(context) - 1 : -1]
        assert greedy == (logits.argmax(-1).tolist() == aim)


def test_a_greedy_continuation_is_told(lm: Any, llama: nn.Module) -> None:
    best = int(llama(input_ids=torch.tensor([[5, 6]])).logits[0, -1].argmax())
    found = lm.loglikelihood([request("w5 w6", f" w{best}"), request("w5 w6", f" w{best ^ 1}")])
    assert [greedy for _, greedy in found] == [True, False]


def test_without_context_the_start_token_is_it(lm: Any, llama: nn.Module) -> None:
    [(likely, _)] = lm.loglikelihood([request("", "w5 w6")])
    assert likely == pytest.approx(float(told(llama, [1, 5, 6]).sum()), rel=1e-4)


def test_a_long_context_loses_its_beginning(llama: nn.Module) -> None:
    with torch.no_grad(), _quiet(False):
        short = _harness_model()(llama, llama, Words(), longest=6)
        [(likely, _)] = short.loglikelihood([request("w9 w9 w9 w3 w4 w5 w6", " w7 w8")])
        expected = told(llama, [9, 3, 4, 5, 6, 7, 8])[-2:].sum()
        assert likely == pytest.approx(float(expected), rel=1e-4)
        with pytest.raises(OptionError, match="continuation has 7 tokens, and the model reads 6"):
            short.loglikelihood([request("w9", " w3" * 7)])


def test_a_long_text_is_scored_once_a_token(llama: nn.Module) -> None:
    with torch.no_grad(), _quiet(False):
        short = _harness_model()(llama, llama, Words(), longest=4)
        found = short.loglikelihood_rolling([request("w5 w6 w7"), request("w3 w4 w5 w6 w7 w8")])
        first = told(llama, [1, 5, 6, 7]).sum()
        windows = told(llama, [1, 3, 4, 5, 6]).sum() + told(llama, [4, 5, 6, 7, 8])[-2:].sum()
    assert found == pytest.approx([float(first), float(windows)], rel=1e-4)


# ---- texts ---------------------------------------------------------------------------------------


def greedy(llama: Any, prompt: list[int], count: int) -> list[int]:
    written: list[int] = []
    for _ in range(count):
        logits = llama(input_ids=torch.tensor([prompt + written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def test_texts_are_greedy_and_end_before_a_stop(lm: Any, llama: nn.Module) -> None:
    written = greedy(llama, [5, 6], 6)
    whole = Words().decode(written)
    assert 2 not in written
    asked = [
        request("w5 w6", {"max_gen_toks": 6}),
        request("w5 w6", {"max_gen_toks": 6, "until": [f"w{written[3]}", "never"]}),
        request("w5 w6", {"max_gen_toks": 6, "until": f" w{written[0]}"}),
    ]
    assert lm.generate_until(asked) == [whole, whole[: whole.index(f"w{written[3]}")], ""]


def test_a_text_ends_with_the_end_token(llama: nn.Module, lm: Any) -> None:
    written = greedy(llama, [5, 6], 3)
    lm.tokenizer.eos_token_id = written[2]
    expected = Words().decode(written[: written.index(written[2])])
    assert lm.generate_until([request("w5 w6", {"max_gen_toks": 6})]) == [expected]


def test_what_is_not_written(lm: Any) -> None:
    with pytest.raises(OptionError, match="samples its texts"):
        lm.generate_until([request("w5", {"do_sample": True, "max_gen_toks": 2})])
    with pytest.raises(OptionError, match="writes 64 tokens, and the model reads 64"):
        lm.generate_until([request("w5", {"max_gen_toks": 64})])


# ---- a task of local files -----------------------------------------------------------------------

QUESTIONS = 24


@pytest.fixture
def folder(tmp_path: Path, llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of choices between the dense model's likeliest next token and another one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True, raising=False)
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(QUESTIONS):
        tokens = torch.randint(3, VOCAB, (1, 6), generator=generator)
        with torch.no_grad():
            best, second = llama(input_ids=tokens).logits[0, -1].topk(2).indices.tolist()
        choices = [f"w{second}", f"w{best}"]
        lines.append(json.dumps({"text": words(tokens[0]), "choices": choices, "label": 1}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    task = {
        "task": "next_word",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "next_word.yaml").write_text(json.dumps(task))  # JSON is YAML
    return tmp_path


def test_a_task_is_answered_by_both_models(
    llama: nn.Module, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [found] = evaluate_tasks(llama, Words(), ["next_word"], folder=folder, **ALL)
    data = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    run = torch.compile(llama, backend="amber_eager", options={"projections": ALL["projections"]})
    right = []
    for one in data:
        ids = [int(word[1:]) for word in one["text"].split()]
        with torch.no_grad():
            logits = run(input_ids=torch.tensor([ids])).logits[0, -1]
        second, best = (float(logits[int(word[1:])]) for word in one["choices"])
        right.append(float(best > second))
    share = sum(right) / QUESTIONS
    assert (found.task, found.metric, found.documents) == ("next_word", "acc", QUESTIONS)
    assert (found.dense, found.dense_se) == (1, 0)
    assert found.sparse == pytest.approx(share)
    assert 0 < share < 1
    assert found.difference == pytest.approx(share - 1)
    expected = float(torch.tensor(right).double().std() / QUESTIONS**0.5)
    assert found.difference_se == pytest.approx(expected)
    assert found.sparse_se == pytest.approx(expected)
    assert "dense 1.0000 ± 0.0000" in str(found)
    assert json.loads(json.dumps(found.to_json()))["difference"] == found.difference
    printed = capsys.readouterr()
    assert not printed.out
    assert not printed.err


def test_only_so_many_documents(llama: nn.Module, folder: Path) -> None:
    [found] = evaluate_tasks(
        llama, Words(), ["next_word"], folder=folder, limit=3, skip=["*"], progress=False
    )
    assert found.documents == 3
    assert (found.dense, found.sparse, found.difference_se) == (1, 1, 0)


def test_mistakes(llama: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def own(include_path: Any, **_: Any) -> Any:  # reading the harness' list takes seconds
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    with pytest.raises(OptionError, match="unknown task 'next_wrd'; did you mean 'next_word'"):
        evaluate_tasks(llama, Words(), ["next_wrd"], folder=folder, **ALL)
    with pytest.raises(OptionError, match="tasks= names no task"):
        evaluate_tasks(llama, Words(), [], **ALL)
    with pytest.raises(OptionError, match="limit=0 must be"):
        evaluate_tasks(llama, Words(), ["next_word"], limit=0, **ALL)


def test_without_the_harness_the_error_says_what_to_install(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "amber_compile.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install 'amber-compile\[eval\]'"):
        evaluate_tasks(llama, Words(), ["next_word"], **ALL)
