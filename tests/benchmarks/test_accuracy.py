"""What N:M costs the shipped model, on a few windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import accuracy


def test_cases_say_what_they_are():
    assert accuracy.CASES["2:4 robust_norm, None"] == {
        "pattern": "2:4",
        "score": "robust_norm",
        "correction": None,
    }
    assert list(accuracy.chosen(accuracy.CASES, "8:16 w*")) == [
        "8:16 weight_norm, None",
        "8:16 weight_norm, norm",
        "8:16 weight_norm, variance",
    ]


def test_a_row_a_picture_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plot = tmp_path / "frontier.svg"
    only = "2:4 weight_norm, norm: with o"
    accuracy.main(["--windows", "2", "--only", only, "--json", "--plot", str(plot)])
    result = json.loads((tmp_path / "accuracy.json").read_text())
    [row] = result["rows"]
    assert row["case"] == only
    assert row["coverage"] == pytest.approx(2 / 3)
    assert row["dnll"] > 0 < row["kl"]
    assert 1.5 < result["dense_nll"] == row["dense_nll"] < 3.5
    assert "2:4 weight_norm, norm: with o" in capsys.readouterr().out
    assert plot.read_bytes()[:5] == b"<?xml"
