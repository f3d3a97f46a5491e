"""Plans: to a file and back, damage that is noticed, and the models they refuse."""

import errno
import json
import os
import re
import string
import time

import pytest
import torch
from torch import nn

from amber_compile import AmberConfig, Plan, Report, Settings, last_reports, plan, plan_file
from amber_compile.errors import PlanError
from amber_compile.plan import PlannedSite

SMALL = Plan(
    {
        "model.layers.0.self_attn.q_proj": PlannedSite((64, 64), Settings("2:4", "magnitude")),
        "model.layers.0.mlp.experts.down_proj": PlannedSite((4, 64, 96), Settings(part="gate")),
        "lm_head": PlannedSite((96, 64), "rule: heads stay dense"),
    },
    {"amber": "0.1.0", "by": 'a "quoted" name, \u00e9 and \u4e2d'},
)
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LARGE = Plan(
    {
        f"model.layers.{layer}.{name}": PlannedSite(
            (4096, 4096), "k_proj stays dense" if name == "k_proj" else Settings()
        )
        for layer in range(32)
        for name in SITES
    }
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "llama.plan"


def load_error(path) -> str:
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    return str(caught.value)


# ---- there and back ----


@pytest.mark.parametrize("saved", [SMALL, LARGE, Plan({})], ids=["small", "large", "empty"])
def test_a_plan_comes_back_as_it_was(path, saved):
    saved.save(path)
    loaded = Plan.load(path)
    assert loaded == saved
    assert list(loaded.sites) == list(saved.sites)  # in the model's order
    assert hash(loaded) == hash(saved)
    assert all(type(site.shape) is tuple for site in loaded.sites.values())


def test_a_site_is_a_line(path):
    SMALL.save(path)
    text = path.read_text()
    assert text.isascii()
    assert text.endswith("\n}\n")
    lines = [line for line in text.splitlines() if "proj" in line or "lm_head" in line]
    assert len(lines) == 3
    assert lines[2].strip() == '"lm_head": {"shape": [96, 64], "dense": "rule: heads stay dense"}'


def test_one_change_is_one_line_and_the_checksum(path):
    other = {**SMALL.sites, "lm_head": PlannedSite((96, 64), "not now")}
    texts = []
    for saved in (SMALL, Plan(other, SMALL.made)):
        saved.save(path)
        texts.append(path.read_text().splitlines())
    changed = [old for old, new in zip(*texts, strict=True) if old != new]
    assert [line.split('"')[1] for line in changed] == ["lm_head", "checksum"]


def test_the_file_is_json(path):
    SMALL.save(path)
    assert json.loads(path.read_text()) == SMALL.to_json()


def test_a_plan_of_a_large_model_loads_in_milliseconds(path):
    LARGE.save(path)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        Plan.load(path)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1  # a few milliseconds; the rest is for a busy machine


# ---- saving ----


def test_saving_replaces_the_old_plan_and_leaves_nothing_else(path):
    LARGE.save(path)
    SMALL.save(path)
    assert Plan.load(path) == SMALL
    assert os.listdir(path.parent) == [path.name]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full_disk, interrupt])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_plan(path, monkeypatch, step, failure):
    SMALL.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(plan_file.os, step, failure)
        with pytest.raises((OSError, KeyboardInterrupt)):
            LARGE.save(path)
    assert Plan.load(path) == SMALL
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_leaves_the_old_plan(path, monkeypatch):
    SMALL.save(path)
    full = open("/dev/full", "w")  # noqa: SIM115  # save() closes it
    monkeypatch.setattr(plan_file, "open", lambda *_, **options: full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        LARGE.save(path)
    assert Plan.load(path) == SMALL


def test_what_is_no_json_is_noticed_before_anything_is_written(path):
    SMALL.save(path)
    with pytest.raises(TypeError):
        Plan(SMALL.sites, {"when": object()}).save(path)
    assert Plan.load(path) == SMALL
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_does_not_exist(path):
    with pytest.raises(FileNotFoundError):
        SMALL.save(path / "below" / "llama.plan")


def test_a_link_stays_a_link(path):
    target = path.with_name("target.plan")
    LARGE.save(target)
    path.symlink_to(target)
    SMALL.save(path)
    assert path.is_symlink()
    assert Plan.load(target) == SMALL


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_a_plan_as_the_umask_says(path):
    old = os.umask(0o022)
    try:
        SMALL.save(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


# ---- damage ----


def test_a_file_cut_short_anywhere(path):
    SMALL.save(path)
    text = path.read_bytes()
    for length in range(len(text) - 1):  # but for the newline at its end
        path.write_bytes(text[:length])
        with pytest.raises(PlanError, match="cut short or not JSON"):
            Plan.load(path)


def test_a_single_character_replaced_anywhere(path):
    SMALL.save(path)
    text = path.read_text()
    for at, old in enumerate(text):
        if old.isspace() and not _inside_a_string(text, at):
            continue  # white space between values means nothing
        for new in {"x", "7", '"', "{", " ", chr(ord(old) ^ 1)} - {old}:
            with pytest.raises(PlanError):
                _read(path, text[:at] + new + text[at + 1 :])


def _inside_a_string(text: str, at: int) -> bool:
    return len(re.findall(r'(?<!\\)"', text[:at])) % 2 == 1


def test_a_single_character_dropped_or_added(path):
    SMALL.save(path)
    text = path.read_text()
    for at, old in enumerate(text):
        for damaged in (text[:at] + text[at + 1 :], text[:at] + "3" + text[at:]):
            try:
                assert _read(path, damaged) == SMALL, f"{damaged[max(0, at - 20) : at + 20]!r}"
                assert old in string.whitespace
            except PlanError:
                pass


def _read(path, text: str) -> Plan:
    path.write_text(text)
    return Plan.load(path)


def test_white_space_is_no_damage(path):
    SMALL.save(path)
    data = json.loads(path.read_text())
    assert _read(path, json.dumps(data, indent=4)) == SMALL
    assert _read(path, json.dumps(data)) == SMALL


def test_an_edit_is_told_with_the_way_to_do_it(path):
    SMALL.save(path)
    path.write_text(path.read_text().replace("magnitude", "weight_norm"))
    assert load_error(path) == (
        f"plan file {str(path)!r} was edited or damaged after it was saved: wrong checksum. Change "
        "a plan in Python: Plan({**plan.sites, name: PlannedSite(...)}).save(path)"
    )


def test_a_missing_file(path):
    assert load_error(path) == f"plan file {str(path)!r} cannot be read: No such file or directory"


def test_a_directory(tmp_path):
    assert load_error(tmp_path).endswith("cannot be read: Is a directory")


def test_bytes_that_are_no_text(path):
    path.write_bytes(b"\x80\x81\x82")
    assert "is cut short or not JSON" in load_error(path)


@pytest.mark.parametrize("data", [[], 3, "amber-plan", None, {}, {"format": "safetensors"}])
def test_json_that_is_no_plan(path, data):
    path.write_text(json.dumps(data))
    assert load_error(path).endswith("is not an Amber plan: it has no 'format': 'amber-plan'")


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_version(path, version):
    path.write_text(json.dumps(SMALL.to_json() | {"version": version}))
    assert load_error(path).endswith(f"has version {version!r}; this Amber reads 1 and 2")


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"shape": [8, 16]},
        {"dense": "no shape"},
        {"shape": 8, "dense": "one number"},
        {"shape": ["a"], "dense": "no number"},
        {"shape": [8, 16], "sparse": {"pattern": "3:2"}},
        {"shape": [8, 16], "sparse": {"patern": "2:4"}},
        {"shape": [8, 16], "sparse": "2:4"},
        "dense",
        None,
    ],
)
def test_an_entry_that_no_plan_has(entry):
    body = {"format": "amber-plan", "version": 1, "made": {}, "sites": {"q_proj": entry}}
    data = {**body, "checksum": plan._digest(body)}
    with pytest.raises(PlanError, match="the plan holds an unreadable entry: "):
        Plan.from_json(data)


@pytest.mark.parametrize("missing", ["made", "sites", "checksum"])
def test_a_part_that_is_missing(missing):
    data = SMALL.to_json()
    del data[missing]
    if missing != "checksum":
        data["checksum"] = plan._digest({k: v for k, v in data.items() if k != "checksum"})
    with pytest.raises(PlanError):
        Plan.from_json(data)


# ---- models ----


def shapes(of: Plan) -> dict[str, tuple[int, ...]]:
    return {name: site.shape for name, site in of.sites.items()}


def test_a_plan_fits_its_model_and_any_part_of_it():
    LARGE.check_model(shapes(LARGE))
    LARGE.check_model({"model.layers.3.q_proj": (4096, 4096)})
    LARGE.check_model({})


def test_another_shape_and_an_unknown_name_are_told():
    with pytest.raises(PlanError) as caught:
        SMALL.check_model({"lm_head": (128, 64), "score": (2, 64)})
    assert str(caught.value) == (
        "the plan belongs to another model: 2 of 2 projections differ: lm_head [128, 64] "
        "(plan: [96, 64]), score [2, 64] (plan: absent). A model compiled in parts has shortened "
        "names: call amber_compile.register_model(model) first"
    )


def test_of_many_differences_five_are_told():
    with pytest.raises(PlanError) as caught:
        Plan({}).check_model(shapes(LARGE))
    message = str(caught.value)
    assert "224 of 224 projections differ" in message
    assert message.count("(plan: absent)") == 5
    assert "and 219 more." in message


class Block(nn.Module):
    """An MLP under the names that the rule knows."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)
        self.up_proj = nn.Linear(16, width)
        self.down_proj = nn.Linear(width, 16)

    def forward(self, x):
        return self.down_proj(self.up_proj(self.q_proj(x)).relu())


def decisions(model: nn.Module, **options: object) -> tuple[Report, dict[str, object]]:
    with torch.no_grad():
        torch.compile(model, backend="amber_eager", options=options)(torch.randn(2, 4, 16))
    report = last_reports()[-1]
    return report, {site.name: site.decision.settings for site in report.sites}


def test_a_report_becomes_a_plan_with_the_same_decisions(path):
    first, decided = decisions(Block(), pattern="4:8", score="magnitude", dense_prefix=1)
    made = first.plan(by="a test")
    made.save(path)
    second, again = decisions(Block(), plan=str(path))
    assert again == decided
    assert {site.name: site.decision.reason for site in second.sites} == {
        "q_proj": None,
        "up_proj": "plan: rule: up_proj stays dense",
        "down_proj": None,
    }
    assert made.made["by"] == "a test"
    assert "amber" in made.made


def test_a_plan_made_under_a_plan_is_the_same_plan():
    made = decisions(Block())[0].plan()
    assert decisions(Block(), plan=made)[0].plan() == made


def test_another_model_is_refused():
    made = decisions(Block())[0].plan()
    with pytest.raises(Exception, match=r"another model: 2 of 3 projections differ: up_proj \[64"):
        decisions(Block(64), plan=made)


def test_skip_goes_before_the_plan():
    made = decisions(Block())[0].plan()
    report, _ = decisions(Block(), plan=made, skip="*q_proj")
    assert report.sites[0].decision.reason == "skip='*q_proj'"
    assert report.sites[2].decision.sparse


# ---- a value ----


def test_what_the_caller_changes_later_has_no_effect():
    sites, made = dict(SMALL.sites), {"by": "me"}
    copied = Plan(sites, made)
    sites.clear()
    made.clear()
    assert (copied.sites, copied.made) == (SMALL.sites, {"by": "me"})


def test_equal_plans_are_equal_and_hash_alike():
    assert Plan(SMALL.sites, SMALL.made) == SMALL
    assert len({SMALL, Plan(SMALL.sites, SMALL.made), LARGE}) == 2
    assert Plan(SMALL.sites) != SMALL  # made differs
    turned = Plan(dict(reversed(SMALL.sites.items())), SMALL.made)
    assert turned == SMALL
    assert hash(turned) == hash(SMALL)
    assert AmberConfig(plan=SMALL) == AmberConfig(plan=Plan(SMALL.sites, SMALL.made))
