"""A whole run: parts that fail, results, tables and the command line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import gpu
import pytest
import torch
from gpu_rows import ROWS
from gpu_tables import problems, tables
from gpu_verdicts import TARGETS
from rich.console import Console

WRONG = {"int8": "AcceleratorError: CUDA error: an illegal memory access was encountered"}


def test_a_part_that_hangs_keeps_its_rows(tmp_path):
    script = """printf '{"a": 1}\\n{"b"' > "$2"; exec sleep 60"""
    rows, error = gpu.run_part(["sh", "-c", script, "part"], tmp_path / "rows", 2.0)
    assert (rows, error) == ([{"a": 1}], "killed after 2 s")


def test_a_part_that_crashes_has_its_status(tmp_path):
    rows, error = gpu.run_part([sys.executable, "-c", "exit(3)"], tmp_path / "rows", 20.0)
    assert (rows, error) == ([], "exit status 3")


@pytest.fixture
def result(tmp_path, monkeypatch) -> dict:
    """A whole run whose parts answer at once; fp16 hangs in its correctness part, int8 crashes."""
    asked = []

    def run_part(command: Sequence[str], out: Path, seconds: float) -> tuple[list, str]:
        part = command[command.index("--part") + 1]
        kinds = command[command.index("--kinds") + 1 : command.index("--seconds")]
        name, _, kind = part.partition(" ")
        rate = {"family": "wgmma", "kind": "bf16", "teraops": 600.0}
        small = {"operation": "compress bf16", "tokens": 8192, "channels": 4096}
        rows = {
            "rates": [rate | {"sparse": False}, rate | {"sparse": True, "teraops": 900.0}],
            "ceilings": [
                {"ceiling": "copy", "per_second": 3e12},
                {"ceiling": "dense bf16 cublasLt", "per_second": 1e12},
            ],
            "correctness": [{"kind": kind, "check": "", "wrong": WRONG.get(kind, "")}],
            "compress": [small | {"bandwidth": 2.4e12, "seconds": 1e-5}],
            "gemm": [*ROWS, {"channels": 64, "outputs": 64, "tokens": 1, "skipped": "out of time"}],
        }[name]
        asked.append((part, kinds))
        return rows, "killed after 60 s" if kind == "fp16" else ""

    monkeypatch.setattr(gpu, "run_part", run_part)
    parts = [part for part in gpu.LIMITS if part != "tune"]
    found = gpu.run_parts(parts, 7.5, tmp_path / "deep" / "gpu.json")
    assert dict(asked)["rates"] == ["bf16", "fp16", "int8", "fp8"]
    assert dict(asked)["gemm"] == ["bf16", "fp8"]
    assert json.loads((tmp_path / "deep" / "gpu.json").read_text()) == json.loads(json.dumps(found))
    return found


def test_a_run_records_failures_and_leaves_their_kind_out(result):
    assert result["errors"] == {"correctness fp16": "killed after 60 s"}
    assert gpu.failed(result)
    assert {row["kind"] for row in result["correctness"]} == {"bf16", "fp16", "int8", "fp8"}
    assert len(result["verdicts"]) == len(TARGETS) + 3


def test_the_tables_show_what_was_measured(result):
    console = Console(width=160, record=True, file=io.StringIO())
    for table in tables(result):
        console.print(table)
    text = console.export_text()
    for part in (
        "1.50",
        "3 TB/s",
        "80%",
        "1.40",
        "50%",
        "out of memory",
        "amber bf16 compress+multiply",
    ):
        assert (part in text) == (part != "out of memory")
    assert "gemm: fp8 amber compress+multiply" in "\n".join(problems(result))


def test_nothing_is_measured_when_the_time_is_over(tmp_path):
    found = gpu.run_parts(["rates"], 0.0, tmp_path / "gpu.json")
    assert found["errors"] == {"rates": "no time left for it"}


def test_arguments():
    found = gpu.parse([])
    assert found.only == ["rates", "ceilings", "correctness", "compress", "gemm"]
    assert found.minutes < 8
    assert gpu.parse(["--only", "gemm", "--out", "x"]).out == Path("x")
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "nothing"])


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "parse", lambda: SimpleNamespace(part=None))
    assert gpu.main() == 1
    assert capsys.readouterr().err == gpu.NO_GPU + "\n"
