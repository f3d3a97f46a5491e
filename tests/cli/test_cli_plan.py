"""``amber plan show`` and ``amber plan diff``."""

import json

import pytest
import torch

from amber_compile import Plan, Settings
from amber_compile.cli import main
from amber_compile.plan import PlannedSite
from amber_compile.quantization import Quantization

SITES = {
    "layers.0.q_proj": PlannedSite((8, 16), Settings("2:4", "magnitude"), Quantization()),
    "layers.0.k_proj": PlannedSite((8, 16), "rule: k stays dense", "sensitive"),
}
TENSORS = {"layers.0.q_proj": {"factor": torch.ones(16)}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.plan"
    Plan(SITES, {"by": "a test"}, TENSORS).save(path)
    return path


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "b.plan"
    sites = {**SITES, "layers.0.k_proj": PlannedSite((8, 16), Settings("4:8"))}
    Plan(sites, {"by": "a test"}, TENSORS).save(path)
    return path


def test_show_lists_every_site_with_totals(capsys, saved):
    assert main(["plan", "show", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["projection", "weight", "input"]
    assert lines[1].split() == ["layers.0.q_proj", "8x16", "2:4", "magnitude", "int8", "factor"]
    assert "dense   rule: k stays dense   16 bit: sensitive" in lines[2]
    assert "sparse           1, 50.0% of the linear weights" in lines
    assert "tensors          1, 64 bytes" in lines
    assert lines[-1] == "by: a test"
    assert not any(line.endswith(" ") for line in lines)


def test_show_for_machines(capsys, saved):
    assert main(["plan", "show", str(saved), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["totals"]["coverage"] == 0.5
    assert facts["tensors"] == {"layers.0.q_proj": ["factor"]}
    assert facts["sites"]["layers.0.k_proj"]["dense"] == "rule: k stays dense"
    assert facts["made"] == {"by": "a test"}


def test_diff_ends_as_diff_does(capsys, saved, other):
    assert main(["plan", "diff", str(saved), str(saved)]) == 0
    assert capsys.readouterr().out.startswith("equal\n")
    assert main(["plan", "diff", str(saved), str(other)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("1 of 2 projections differ\n")
    assert "input: dense: rule: k stays dense -> sparse" in out
    assert "50.0% of the linear weights" in out
    assert "100.0% of the linear weights" in out


def test_diff_for_machines(capsys, saved, other):
    assert main(["plan", "diff", str(saved), str(other), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["equal"] is False
    assert list(facts["sites"]) == ["layers.0.k_proj"]


@pytest.mark.parametrize("action", [["show"], ["diff", "none.plan"]])
def test_a_file_that_cannot_be_read(capsys, action):
    assert main(["plan", *action, "none.plan"]) == 2
    assert "amber plan: plan file 'none.plan' cannot be read" in capsys.readouterr().err


def test_without_an_action(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan"])
    assert caught.value.code == 2
