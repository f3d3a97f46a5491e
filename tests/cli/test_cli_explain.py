"""``amber explain``: what it prints where, and the one line of each mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from amber_compile import Plan, cli
from amber_compile.cli import explain as command
from amber_compile.cost.rates import machines

pytest.importorskip("transformers")

SHIPPED = Path(__file__).parents[2] / "examples" / "python-lm"
LINEARS = 8 * 7 + 1


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", ("explain",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with the shipped model's configuration, cut to one layer."""
    config = json.loads((SHIPPED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return tmp_path


def facts(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Run the command with ``--json`` and return what is on stdout."""
    assert cli.main(["explain", *map(str, arguments), "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_people_get_a_table_and_progress_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(SHIPPED), "--tokens", "64"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"Amber: 24 of {LINEARS} projections sparse, 58.3%")
    assert "graphs: 1 prefill; no graph breaks\nexplained for cuda, from shapes" in printed.out
    assert "model.layers.7.mlp.down_proj" in printed.out
    assert "expected speed-up" in printed.out.splitlines()[2]
    assert printed.err.splitlines() == [
        f"amber explain: reading the configuration of {SHIPPED}",
        "amber explain: tracing 1 x 64 tokens for cuda",
    ]


def test_machines_get_json_alone(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = facts(capsys, small, "--tokens", 64, "--batch", 2, "--device", "cpu")
    assert (data["model"], data["batch"], data["tokens"]) == (str(small), 2, 64)
    assert (data["device"], len(data["sites"]), data["breaks"]) == ("cpu", 8, [])
    assert [graph["phase"] for graph in data["graphs"]] == ["prefill"]
    assert "positions" not in capsys.readouterr().err


def test_a_page_is_written_where_it_is_wanted(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["explain", str(small), "--tokens", "8", "--html", str(page)]) == 0
    assert "model.layers.0.mlp.down_proj" in page.read_text()
    assert capsys.readouterr().err.splitlines()[-1] == f"amber explain: wrote {page}"


def test_weights_are_never_read(small: Path) -> None:
    model = command.build(str(small))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [path.name for path in small.iterdir()] == ["config.json"]


def test_options_reach_the_backend(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = facts(capsys, small, "--pattern", "8:16", "--preset", "paper", "--skip", "*.q_proj")
    sites = {site["name"].rpartition(".")[2]: site for site in data["sites"]}
    assert sites["q_proj"]["dense"] == "skip='*.q_proj'"
    assert sites["down_proj"]["sparse"]["pattern"] == "8:16"
    assert sites["down_proj"]["sparse"]["score"] == "robust_norm"
    data = facts(capsys, small, "--tokens", 8, "--min-tokens", 9)
    assert data["coverage"] == 0
    data = facts(capsys, small, "--projections", "*.v_proj", "--dense-prefix", 4)
    assert [one["name"] for one in data["sites"] if one["sparse"]] == [
        "model.layers.0.self_attn.v_proj"
    ]


def test_a_plan_decides(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "all.plan"
    report = command.explain(command.build(str(small)), *_tokens(), projections="*.k_proj")
    report.plan().save(plan)
    data = facts(capsys, small, "--plan", plan)
    assert [one["name"].rpartition(".")[2] for one in data["sites"] if one["sparse"]] == ["k_proj"]
    assert Plan.load(plan).sites.keys() == {one["name"] for one in data["sites"]}


def _tokens() -> Any:
    import torch

    return (torch.empty(1, 8, dtype=torch.long, device="meta"),)


@pytest.mark.parametrize("machine", machines()[:1])
def test_the_speed_up_is_that_of_a_machine_with_rates(
    small: Path, capsys: pytest.CaptureFixture[str], machine: str
) -> None:
    expected = facts(capsys, small, "--machine", machine)["expected"]
    assert expected["machine"] == machine
    assert expected["tokens"] == 2048
    assert f"{expected['speedup']:.2f}x with 2048 tokens on {machine}" in expected["text"]


def test_without_rates_it_says_which_there_are(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = facts(capsys, small, "--device", "cpu")["expected"]
    assert expected["machine"] is None
    assert all(machine in expected["text"] for machine in machines())


def test_an_encoder_is_a_language_model_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = {"model_type": "bert", "num_attention_heads": 4, "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    names = [site["name"] for site in facts(capsys, tmp_path, "--tokens", 16)["sites"]]
    assert "cls.predictions.decoder" in names


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    return tmp_path


MISTAKES = [
    (["/nowhere/at/all"], "there is no folder '/nowhere/at/all'"),
    (["./nowhere"], "there is no folder './nowhere'"),
    (["nobody/nothing"], "nobody/nothing has no readable configuration: OSError"),
    ([SHIPPED / "config.json"], "is a file; needed: a folder with a config.json"),
    ([SHIPPED.parent], "holds no config.json"),
    ([SHIPPED, "--pattern", "5:4"], "5:4 is not an N:M pattern"),
    ([SHIPPED, "--preset", "best"], "unknown preset 'best'"),
    ([SHIPPED, "--plan", "none.plan"], "plan file 'none.plan' cannot be read"),
    ([SHIPPED, "--device", "tpu"], "unknown device 'tpu'"),
    ([SHIPPED, "--machine", "abacus"], "unknown machine 'abacus'"),
    ([SHIPPED, "--tokens", "0"], "tokens=0 must be a whole number >= 1"),
    ([SHIPPED, "--min-tokens", "0"], "min_tokens=0 must be a whole number >= 1"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[one[1] for one in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    check_mistake(capsys, arguments, message)


def check_mistake(
    capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    assert cli.main(["explain", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("amber explain: ")
    assert message in last
    assert not any("Traceback" in line for line in printed.err.splitlines())


def test_what_is_no_language_model(vision: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_mistake(capsys, [vision], "is a 'vit', which is no language model")


def test_a_damaged_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    check_mistake(capsys, [tmp_path], "has no readable configuration")


def test_a_configuration_that_makes_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 64, "n_head": 3}')
    check_mistake(capsys, [tmp_path], "cannot be built: ValueError: ")


def test_a_model_that_fails(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("sizes differ\n and more")

    monkeypatch.setattr(command, "explain", fail)
    check_mistake(capsys, [small], f"{small} cannot be traced: RuntimeError: sizes differ")


def test_more_tokens_than_the_model_knows_are_told(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", str(small), "--tokens", "513"]) == 0
    assert "the model knows 512 positions, fewer than --tokens 513" in capsys.readouterr().err
