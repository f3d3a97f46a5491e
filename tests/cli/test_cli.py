"""The command line: ``amber COMMAND``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from amber_compile.cli import main
from amber_compile.errors import OptionError


def amber(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the installed command in a process of its own."""
    command = [str(Path(sys.executable).with_name("amber")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_is_installed():
    done = amber("--help")
    assert done.returncode == 0, done.stderr
    assert "what this machine can run" in done.stdout


def test_an_unknown_command_names_the_known_ones():
    done = amber("unknown")
    assert done.returncode == 2
    assert "env" in done.stderr


def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys):
    def fail() -> None:
        raise OptionError("pattern='5:4' is no pattern")

    monkeypatch.setattr("amber_compile.cli.env.environment", fail)
    assert main(["env"]) == 2
    assert capsys.readouterr().err == "amber env: pattern='5:4' is no pattern\n"


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"]])
def test_env_tells_of_this_machine(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    if "--json" in arguments:
        found = json.loads(out)
        assert set(found) == {"versions", "cpu", "cpu_kernel", "gpus", "no_gpu"}
    else:
        assert "torch" in out
        assert "selection" in out
