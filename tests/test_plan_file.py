"""The two files of a plan: they belong together, whatever fails, and whoever else writes."""

import errno
import json
import multiprocessing
import os
import shutil
import time

import pytest
import torch

from amber_compile import Plan, Settings, plan_file
from amber_compile.errors import PlanError
from amber_compile.plan import Move, PlannedSite, _digest
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization

FORK = multiprocessing.get_context("fork")
"""Quick to start; these processes use no threads of torch."""
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SITES = {
    "q_proj": PlannedSite((8, 16), Settings(), Quantization("int8", "outstanding", 0.1)),
    "k_proj": PlannedSite((8, 16), "dense", "it is sensitive"),
    "down_proj": PlannedSite(
        (8, 16),
        Settings(),
        None,
        (Move("down_proj.weight", 1, 0, 16), Move("qkv.weight", 0, 8, 4, 2)),
    ),
}


def plan_with(value: float) -> Plan:
    """Return a plan whose tensors all hold ``value``."""
    factors = {name: {"factor": torch.full((16,), value)} for name in SITES}
    return Plan(SITES, {"value": str(value)}, factors)


def value_of(plan: Plan) -> float:
    """Return what all tensors hold, which must be what the JSON says."""
    values = [plan.tensors.get(name, "factor") for name in SITES]
    (found,) = {value for one in values for value in one.tolist()}
    assert plan.made["value"] == str(found)
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "llama.plan"


def beside(path) -> list[str]:
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


def load_error(path) -> str:
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    return str(caught.value)


# ---- there and back ----


def test_everything_comes_back(path):
    saved = plan_with(1.0)
    saved.save(path)
    loaded = Plan.load(path)
    assert loaded == saved
    assert hash(loaded) == hash(saved)
    assert value_of(loaded) == 1.0
    assert beside(path) == [f"llama.plan.{saved.tensors.id}.safetensors"]


def test_the_json_says_which_tensors(path):
    saved = plan_with(1.0)
    saved.save(path)
    data = json.loads(path.read_text())
    (file,) = beside(path)
    size = path.with_name(file).stat().st_size
    assert data["tensors"] == {"file": file, "id": saved.tensors.id, "bytes": size}
    assert data["sites"]["q_proj"]["quantize"] == {
        "dtype": "int8",
        "smooth": "outstanding",
        "alpha": 0.1,
    }
    assert data["sites"]["k_proj"]["quantize"] == "it is sensitive"
    assert "quantize" not in data["sites"]["down_proj"]
    assert data["sites"]["down_proj"]["moves"] == [
        ["down_proj.weight", 1, 0, 16, 1],
        ["qkv.weight", 0, 8, 4, 2],
    ]


def test_without_tensors_there_is_one_file_and_no_safetensors(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    Plan(SITES).save(path)
    assert Plan.load(path) == Plan(SITES)
    assert beside(path) == []


def test_version_1_is_read(path):
    body = {
        "format": "amber-plan",
        "version": 1,
        "made": {},
        "sites": {
            "q": {
                "shape": [8, 16],
                "sparse": {
                    "pattern": "2:4",
                    "score": "weight_norm",
                    "correction": None,
                    "dense_prefix": 0,
                    "part": None,
                },
            }
        },
    }
    path.write_text(json.dumps({**body, "checksum": _digest(body)}))
    assert Plan.load(path) == Plan({"q": PlannedSite((8, 16), Settings())})


def test_saving_replaces_both_files(path):
    for value in (1.0, 2.0, 3.0):
        saved = plan_with(value)
        saved.save(path)
        assert value_of(Plan.load(path)) == value
        assert beside(path) == [f"llama.plan.{saved.tensors.id}.safetensors"]
    Plan(SITES).save(path)
    assert beside(path) == []


def test_a_loaded_plan_outlives_its_file(path):
    plan_with(1.0).save(path)
    old = Plan.load(path)
    plan_with(2.0).save(path)
    assert value_of(old) == 1.0


def test_a_changed_plan_is_saved_over_itself_and_elsewhere(path):
    plan_with(1.0).save(path)
    loaded = Plan.load(path)
    changed = Plan(
        {**loaded.sites, "k_proj": PlannedSite((8, 16), "no")}, loaded.made, loaded.tensors
    )
    for target in (path, path.with_name("other.plan")):
        changed.save(target)
        again = Plan.load(target)
        assert again == changed
        assert value_of(again) == 1.0
    assert not [name for name in beside(path) if name.startswith(".")]
    path.unlink()
    assert value_of(Plan.load(path.with_name("other.plan"))) == 1.0


def test_a_disk_without_links_gets_a_copy(path, monkeypatch):
    plan_with(1.0).save(path)

    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(plan_file.os, "link", no_link)
    Plan.load(path).save(path.with_name("other.plan"))
    assert value_of(Plan.load(path.with_name("other.plan"))) == 1.0


def test_a_save_leaves_the_tensors_of_other_plans_alone(path):
    plan_with(1.0).save(path)
    copied = path.with_name("copy.plan")
    shutil.copy(path, copied)  # names the tensors of llama.plan
    plan_with(2.0).save(copied)
    assert value_of(Plan.load(path)) == 1.0


def test_the_files_move_together(path, tmp_path):
    plan_with(1.0).save(path)
    (tmp_path / "moved").mkdir()
    for name in (path.name, *beside(path)):
        if name != "moved":
            shutil.move(path.with_name(name), tmp_path / "moved" / name)
    assert value_of(Plan.load(tmp_path / "moved" / path.name)) == 1.0


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_umask_says_who_may_read(path):
    old = os.umask(0o022)
    try:
        plan_with(1.0).save(path)
    finally:
        os.umask(old)
    (file,) = beside(path)
    assert path.stat().st_mode & 0o777 == path.with_name(file).stat().st_mode & 0o777 == 0o644


# ---- what does not belong together ----


def test_missing_tensors(path):
    plan_with(1.0).save(path)
    (file,) = beside(path)
    path.with_name(file).unlink()
    assert load_error(path) == (
        f"plan file {str(path)!r}: its tensors file {str(path.with_name(file))!r} is missing; a "
        "plan with tensors is two files: copy it by Plan.load(...).save(...)"
    )


@pytest.mark.parametrize("left", [0, 5, 100, 300])
def test_tensors_cut_short(path, left):
    plan_with(1.0).save(path)
    (file,) = beside(path)
    size = path.with_name(file).stat().st_size
    assert size > left
    os.truncate(path.with_name(file), left)
    assert load_error(path).endswith(f" is cut short: {left} of {size} bytes")


def test_tensors_of_another_save(path):
    plan_with(1.0).save(path)
    (file,) = beside(path)
    plan_with(2.0).tensors.write(path.with_name(file))
    assert "is of another save of the plan; a plan with tensors is two files" in load_error(path)


def test_tensors_with_something_behind(path):
    plan_with(1.0).save(path)
    (file,) = beside(path)
    with open(path.with_name(file), "ab") as end:
        end.write(b"more")
    assert "is cut short or damaged" in load_error(path)


@pytest.mark.parametrize(
    "entry", [3, [], {"file": 3}, {"file": "a"}, {"file": "", "id": "", "bytes": 1}]
)
def test_an_entry_that_names_no_tensors(path, entry):
    body = {**Plan(SITES).to_json(), "tensors": entry}
    del body["checksum"]
    path.write_text(json.dumps({**body, "checksum": _digest(body)}))
    assert "holds an unreadable entry" in load_error(path)


def test_tensors_that_do_not_fit_the_sites(path):
    tensors = PlanTensors({"q_proj": {"factor": torch.ones(4)}})
    with pytest.raises(PlanError, match=r"site 'q_proj': its tensor 'factor' is F32 \[4\]"):
        Plan(SITES, {}, tensors)
    draft = plan_file.save
    draft(path, lambda entry: json.dumps(Plan(SITES).to_json(entry)), tensors)
    assert load_error(path).startswith(f"plan file {str(path)!r}: site 'q_proj': its tensor")


# ---- whatever fails ----


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full_disk, interrupt])
@pytest.mark.parametrize("step", ["fsync", "replace", "write", "copymode", "open"])
def test_a_failed_save_leaves_the_old_plan(path, monkeypatch, step, failure):
    plan_with(1.0).save(path)
    kept = beside(path)
    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(PlanTensors, "write", failure)
        elif step == "copymode":
            patch.setattr(plan_file.shutil, step, failure)
        elif step == "open":
            patch.setattr(plan_file, step, failure, raising=False)
        else:
            patch.setattr(plan_file.os, step, failure)
        with pytest.raises((OSError, KeyboardInterrupt)):
            plan_with(2.0).save(path)
    assert value_of(Plan.load(path)) == 1.0
    assert beside(path) == kept


def test_interrupted_between_the_two_files(path, monkeypatch):
    plan_with(1.0).save(path)
    replace = os.replace

    def second_fails(draft, target):
        if target == path:
            raise KeyboardInterrupt
        replace(draft, target)

    with monkeypatch.context() as patch:
        patch.setattr(plan_file.os, "replace", second_fails)
        with pytest.raises(KeyboardInterrupt):
            plan_with(2.0).save(path)
    assert value_of(Plan.load(path)) == 1.0
    assert len(beside(path)) == 1


def test_a_really_full_disk(path):
    """The system refuses to write more than so many bytes, half-way through the tensors."""
    plan_with(1.0).save(path)
    kept = beside(path)
    process = FORK.Process(target=save_on_full_disk, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert value_of(Plan.load(path)) == 1.0
    assert beside(path) == kept


def save_on_full_disk(path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        plan_with(2.0).save(path)
    except OSError:
        os._exit(3)


# ---- somebody else ----

ROUNDS = 60


def save_often(path, first: float) -> None:
    for step in range(ROUNDS):
        plan_with(first + step).save(path)


def test_two_processes_that_save_and_one_that_loads_never_mix(path):
    plan_with(0.0).save(path)
    writers = [FORK.Process(target=save_often, args=(path, first)) for first in (100.0, 200.0)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(value_of(Plan.load(path)))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert value_of(Plan.load(path)) in {100.0 + ROUNDS - 1, 200.0 + ROUNDS - 1}
    assert len(beside(path)) == 1
    assert len(seen) > 1


def test_a_load_during_a_save_reads_again(path, monkeypatch):
    plan_with(1.0).save(path)
    read, saved = plan_file._read, []

    def read_then_save(*arguments):
        text = read(*arguments)
        if not saved:
            saved.append(plan_with(2.0).save(path))
        return text

    monkeypatch.setattr(plan_file, "_read", read_then_save)
    assert value_of(Plan.load(path)) == 2.0


def test_a_disk_without_locks(path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(plan_file.fcntl, "flock", no_locks)
    plan_with(1.0).save(path)
    assert value_of(Plan.load(path)) == 1.0


# ---- time ----


def test_a_large_plan_is_mapped_not_read(path):
    names = [f"layers.{layer}.{name}" for layer in range(32) for name in "qkvogud"]
    sites = {name: PlannedSite((4096, 4096), Settings()) for name in names}
    vectors = {name: {"factor": torch.zeros(4096), "absmax": torch.zeros(4096)} for name in names}
    Plan(sites, {}, vectors).save(path)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        Plan.load(path)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1  # a few milliseconds; the rest is for a busy machine
