"""Amber in PyTorch's logs and traces: what each setting shows, in processes of their own."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stack import Stack
from torch._logging import _internal

from amber_compile import last_reports, trace
from amber_compile.report import GraphReport

X = torch.zeros(2, 8, 64)
SUMMARY = "4 of 6 projections sparse"
TABLE = "how, or why not"
PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from stack import Stack
assert "amber_compile.backend" not in sys.modules
with torch.no_grad():
    torch.compile(Stack(), backend="amber_eager")(torch.zeros(2, 8, 64))
"""


@pytest.fixture(scope="module")
def entry_point(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path, in which a distribution has the entry point that registers names."""
    folder = tmp_path_factory.mktemp("site")
    about = folder / "amber_log_names-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: amber-log-names\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "[torch.backends]\namber = amber_compile.torch_logs:entry_point\n"
    )
    return folder


def run(site: Path, **environment: str) -> str:
    """Compile a model in a process of its own; return what it logs."""
    models = str(Path(__file__).with_name("models"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, models],
        env=os.environ | {"PYTHONPATH": str(site)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


# ---- TORCH_LOGS ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "summary", "graphs", "table"),
    [
        ("amber", True, False, False),
        ("amber_graphs", False, True, False),
    ],
)
def test_each_name_shows_its_own(
    entry_point: Path, setting: str, summary: bool, graphs: bool, table: bool
) -> None:
    logged = run(entry_point, TORCH_LOGS=setting)
    lines = [line for line in logged.splitlines() if SUMMARY in line]
    assert sum("[__amber" not in line for line in lines) == summary
    before, _, after = logged.partition("graph after:")
    assert ("graph before:" in before, "torch.ops.amber.nm_select" in after) == (graphs, graphs)
    assert "torch.ops.amber" not in before
    assert (TABLE in logged) == table


def test_the_loggers_own_name_works_where_no_entry_point_runs(entry_point: Path) -> None:
    logged = run(entry_point, TORCH_LOGS="+amber_compile", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert all(part in logged for part in (SUMMARY, TABLE, "graph before:", "graph after:"))


@pytest.fixture
def settings() -> Iterator[None]:
    yield
    torch._logging.set_logs()


@pytest.mark.usefixtures("settings")
@torch.no_grad()
def test_names_can_be_set_from_python(capfd: pytest.CaptureFixture[str]) -> None:
    torch._logging.set_logs(modules={"amber": logging.INFO, "amber_sites": True})
    torch.compile(Stack(), backend="amber_eager")(X)
    logged = capfd.readouterr().err
    assert SUMMARY in logged
    assert TABLE in logged
    assert "graph before:" not in logged


def test_registering_again_changes_nothing() -> None:
    before = dict(_internal.log_registry.log_alias_to_log_qnames)
    trace.register_logs()
    assert _internal.log_registry.log_alias_to_log_qnames == before


# ---- TORCH_TRACE ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(entry_point: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run under ``TORCH_TRACE`` wrote; nothing is logged unasked."""
    folder = tmp_path_factory.mktemp("traces")
    assert run(entry_point, TORCH_TRACE=str(folder)) == ""
    return folder


def test_a_trace_has_both_graphs_and_the_report(traces: Path) -> None:
    (log,) = traces.iterdir()
    records = [line.split("] ", 1)[1] for line in log.read_text().splitlines() if "] {" in line]
    artifacts = [
        record for record in map(json.loads, records) if "amber" in str(record.get("artifact"))
    ]
    assert [one["artifact"]["name"] for one in artifacts] == [
        "amber_graph_before",
        "amber_graph_after",
        "amber_report",
    ]
    assert all(one["frame_id"] == 0 and "stack" not in one for one in artifacts)


def test_tlparse_shows_them_beside_its_own(traces: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("tlparse")
    if not command.exists():
        pytest.skip("tlparse is not installed: pip install tlparse")
    (log,) = traces.iterdir()
    out = tmp_path / "out"
    call = [str(command), str(log), "-o", str(out), "--no-browser", "--strict"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = {path.parent for path in out.rglob("dynamo_output_graph_*")}
    (before,) = folder.glob("amber_graph_before_*.txt")
    (after,) = folder.glob("amber_graph_after_*.txt")
    (report,) = folder.glob("amber_report_*.json")
    assert "torch.ops.amber.nm_select" not in before.read_text()
    assert after.read_text().count("torch.ops.amber.nm_select.default(") == 4
    sites = json.loads(report.read_text())["sites"]
    assert [one["name"] for one in sites if one["sparse"]] == [
        f"layers.{at}.{name}_proj" for at in (0, 1) for name in ("gate", "down")
    ]
    index = (out / "index.html").read_text()
    assert all(path.name in index for path in (before, after, report))


# ---- what nobody asked for -----------------------------------------------------------------------


@torch.no_grad()
def test_no_text_is_made_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise AssertionError("made for nobody")

    # as PyTorch leaves its logger without TORCH_TRACE: pytest adds handlers of its own
    monkeypatch.setattr(_internal.trace_log, "handlers", [])
    monkeypatch.setattr(trace, "_text", fail)
    monkeypatch.setattr(GraphReport, "to_json", fail)
    torch.compile(Stack(), backend="amber_eager")(X[:1])
    assert len(last_reports()) == 1


@torch.no_grad()
def test_a_dense_graph_has_no_graph_after(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="amber_compile"):
        torch.compile(Stack(), backend="amber_eager")(X[:, :1])
    text = "\n".join(record.message for record in caplog.records)
    assert "graph before:" in text
    assert "graph after:" not in text
