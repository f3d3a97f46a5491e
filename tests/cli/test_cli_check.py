"""``amber check``: the worst sites first, for people and for machines."""

import json
from pathlib import Path

import pytest

from amber_compile import cli

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
SHIPPED = str(ROOT / "examples" / "python-lm")
TEXT = str(ROOT / "examples" / "quickstart.py")


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", ("check",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_people_get_the_worst_sites(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", SHIPPED, "--text", TEXT, "--tokens", "64", "--worst", "3"]
    assert cli.main([*arguments, "--projections", "*.layers.1.*"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("Amber: 7 of 57 projections sparse")
    assert "KL " in lines[1]
    assert "top-1 agreement" in lines[1]
    errors = [float(line.split()[0]) for line in lines[4:]]
    assert len(errors) == 3
    assert errors == sorted(errors, reverse=True)
    said = [line for line in printed.err.splitlines() if line.startswith("amber check: ")]
    assert said == [  # transformers shows a bar of its own
        f"amber check: loading {SHIPPED}",
        "amber check: running 64 tokens, dense and sparse",
    ]


def test_machines_get_every_site(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", SHIPPED, "--text", TEXT, "--tokens", "32", "--json"]
    assert cli.main([*arguments, "--pattern", "8:16"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["tokens"], len(facts["sites"])) == (SHIPPED, 32, 57)
    errors = [site["error"] for site in facts["sites"] if site["error"] is not None]
    assert len(errors) == 24
    assert errors == sorted(errors, reverse=True)
    assert 0 < facts["output"]["relative"] < 1
    assert 0 < facts["output"]["top1"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SHIPPED, "--text", "no-such-file"], "--text 'no-such-file' cannot be read: No such file"),
        (["./no-such-folder", "--text", TEXT], "there is no folder './no-such-folder'"),
        ([SHIPPED, "--text", TEXT, "--tokens", "0"], "tokens=0 must be a whole number >= 1"),
        ([SHIPPED, "--text", TEXT, "--pattern", "3:5"], "3:5"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("amber check: ")
    assert message in last
