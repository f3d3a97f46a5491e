"""An interrupted calibration goes on where it stopped, and never from another one's state."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import Toy, text

import amber_compile.calibration.reading as reading
from amber_compile.calibration import CalibrationError, calibrate
from amber_compile.calibration.resume import Checkpoint, data_digest, model_digest
from amber_compile.calibration.statistics import Statistics
from amber_compile.plan import Plan

HERE = Path(__file__).parent


def same(one: Plan, other: Plan) -> bool:
    mine, theirs = one.tensors.to_dict(), other.tensors.to_dict()
    assert {site: set(own) for site, own in mine.items()} == {
        site: set(own) for site, own in theirs.items()
    }
    tensors = all(torch.equal(mine[s][n], theirs[s][n]) for s in mine for n in mine[s])
    return one.sites == other.sites and tensors


def test_a_pass_goes_on_behind_its_last_kept_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(enumerate(torch.arange(1.0, 9.0)))
    read: list[int] = []

    def visit(number, batch, into) -> None:
        if number == 5 and 5 not in read:
            read.append(5)
            raise KeyboardInterrupt
        read.append(number)
        into.add("site", "sum", batch / 3)

    def run(folder: Path | None, visit) -> Statistics:
        reader = reading.Reader(torch.nn.Linear(1, 1), Checkpoint(folder, {}), progress=False)
        return reader.read("pass", batches, visit)

    monkeypatch.setattr(reading, "KEPT_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, visit)
    found = run(tmp_path, visit)
    assert read == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    expected = run(None, lambda number, batch, into: into.add("site", "sum", batch / 3))
    assert torch.equal(found.of("site")["sum"], expected.of("site")["sum"])
    run(tmp_path, visit)
    assert len(read) == 9  # a complete pass is not read again


def test_a_killed_calibration_ends_in_the_same_plan(tmp_path: Path) -> None:
    state = tmp_path / "state"
    code = f"from toy import *; calibrate_and_die({str(state)!r}, 11)"
    died = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    kept = {path.name for path in state.glob("*.safetensors")}
    assert kept
    resumed = calibrate(Toy(), text(), coverage=0.5, progress=False, resume=state)
    assert same(resumed, calibrate(Toy(), text(), coverage=0.5, progress=False))


def test_another_calibration_is_refused_with_what_differs(tmp_path: Path) -> None:
    model, batches = Toy(), text(4)
    calibrate(model, batches, coverage=0.5, progress=False, resume=tmp_path)
    with pytest.raises(CalibrationError, match=r"options\.coverage was 0\.5, is 0\.25\. Repeat"):
        calibrate(model, batches, coverage=0.25, progress=False, resume=tmp_path)
    with pytest.raises(CalibrationError, match="belongs to another calibration: data was '"):
        calibrate(model, text(5), coverage=0.5, progress=False, resume=tmp_path)
    with pytest.raises(CalibrationError, match="belongs to another calibration: model was '"):
        calibrate(Toy(seed=1), batches, coverage=0.5, progress=False, resume=tmp_path)


@pytest.mark.parametrize("written", ["", "{}", '{"format": "amber-plan", "version": 1}', "[1]"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / "run.json").write_text(written)
    with pytest.raises(CalibrationError, match="is no state of a calibration"):
        Checkpoint(tmp_path, {})


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save("fit", {"a": torch.ones(4)}, 2)
    tensors, batches = checkpoint.load("fit")
    assert (tensors["a"].tolist(), batches) == ([1.0] * 4, 2)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CalibrationError, match=r"fit\.rank0\.safetensors' is damaged"):
        checkpoint.load("fit")


def test_a_full_disk_is_a_warning_and_the_old_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save("fit", {"a": torch.ones(4)}, 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(UserWarning, match=r"cannot be kept in .*No space left.*goes on"):
        checkpoint.save("fit", {"a": torch.zeros(4)}, 3)
    assert checkpoint.load("fit")[1] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fit.rank0.safetensors",
        "run.json",
    ]


def test_digests_see_every_change() -> None:
    model = Toy()
    first = model_digest(model)
    assert model_digest(Toy()) == first
    with torch.no_grad():
        model.layers[1].up_proj.weight[7, 3].neg_()
    assert model_digest(model) != first
    assert model_digest(model.bfloat16()) != first
    batches = text(3)
    assert data_digest(batches) == data_digest(text(3))
    assert data_digest(batches) != data_digest(batches[::-1])
    assert data_digest(batches) != data_digest([batch.clone() + 0 for batch in batches[:2]])
    assert data_digest([{"input_ids": batches[0]}]) != data_digest([{"ids": batches[0]}])


def test_no_folder_keeps_nothing(tmp_path: Path) -> None:
    before = set(os.listdir(tmp_path))
    Checkpoint(None, {}).save("fit", {"a": torch.ones(1)}, 1)
    assert Checkpoint(None, {}).load("fit") == ({}, 0)
    assert set(os.listdir(tmp_path)) == before
