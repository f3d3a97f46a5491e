"""``amber calibrate``: a plan in a file, what was decided for people and for machines."""

import errno
import json
from pathlib import Path

import pytest

from amber_compile import cli
from amber_compile.plan import Plan

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
SHIPPED = str(ROOT / "examples" / "python-lm")
TEXT = str(ROOT / "examples" / "python_corpus.py")
FEW = ["--tokens", "2048", "--window", "64", "--no-progress"]
BOUND = ["--coverage", "0.3", "--projections", "*.layers.[67].*", "--corrections", "factor"]


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", ("calibrate",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(Path(TEXT).read_text() * 3)
    return str(path)


def run(*arguments: str) -> int:
    return cli.main(["calibrate", SHIPPED, *arguments])


def test_people_get_a_table_and_a_plan(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "python-lm.plan"
    assert run("--text", text, "-o", str(path), *FEW, "--coverage", "0.1", *BOUND[2:]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["projection", "share", "error", "damage", "decided"]
    sites = [line for line in lines if line.startswith("model.layers.")]
    assert len(sites) == 56
    plan = Plan.load(path)
    chosen = [line for line in sites if "  2:4, " in line]
    assert 0 < len(chosen) < 14
    assert {line.split()[0] for line in chosen} == {
        name for name, site in plan.sites.items() if not isinstance(site.choice, str)
    }
    assert any("of the linear multiply-accumulates" in line for line in lines)
    said = [line for line in printed.err.splitlines() if line.startswith("amber calibrate: ")]
    assert said[0] == f"amber calibrate: loading {SHIPPED}"
    assert said[1].endswith("tokens of text are few: better with 32768 and more")
    assert said[2] == "amber calibrate: reading 2048 tokens in 8 batches"
    assert said[-1] == f"amber calibrate: wrote {path}"


def test_machines_get_every_way_of_every_site(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "python-lm.plan"
    state = tmp_path / "state"
    arguments = ["--text", text, "-o", str(path), *FEW, "--coverage", "0.1", *BOUND[2:]]
    assert run(*arguments, "--json", "--resume", str(state)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["coverage"] >= 0.1
    assert facts["damage"] > 0
    (site,) = (one for one in facts["sites"] if one["name"] == "model.layers.7.mlp.down_proj")
    assert {way["how"] for way in site["ways"]} <= {"2:4, calibrated", "2:4, weight_norm"}
    assert all(way["damage"] > 0 and way["error"] > 0 for way in site["ways"])
    assert facts["made"] == dict(Plan.load(path).made)
    assert (state / "run.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no-such-file", "-o", "p"], "--text 'no-such-file' cannot be read"),
        (["--text", TEXT, "-o", "no-such-folder/p"], "there is no folder 'no-such-folder'"),
        (["--text", TEXT, "-o", str(ROOT)], "is a folder; name a file"),
        (["--text", TEXT, "-o", "p", "--pattern", "3:5"], "3:5"),
        (["--text", TEXT, "-o", "p", "--tokens", "10"], "tokens=10 must be a whole number >= 2048"),
        (
            ["--text", TEXT, "-o", "p", "--corrections", "free,nrom"],
            "unknown corrections 'nrom'; did you mean 'norm'",
        ),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--no-progress") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("amber calibrate: ")
    assert message in last


@pytest.mark.parametrize("words", ["", "one line only\n"])
def test_a_tiny_text_is_refused_with_numbers(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text(words)
    assert run("--text", str(path), "-o", str(tmp_path / "p"), "--no-progress") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the text has 0 tokens; at least 2048 are needed, and 32768 advised" in last


def test_a_full_disk_leaves_the_old_plan(
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "python-lm.plan"
    Plan({}).save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    arguments = ["--text", text, "-o", str(path), *FEW, "--coverage", "0.1", *BOUND[2:]]
    assert run(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written: No space left on device; what was there before is unchanged" in last
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.glob("*plan*")] == ["python-lm.plan"]
