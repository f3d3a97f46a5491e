"""Time to first token, on models small enough for a CPU."""

from __future__ import annotations

import pytest
import torch
import ttft
import ttft_models

CPU = torch.device("cpu")


def test_the_models_are_those_that_are_named():
    with torch.device("meta"):
        sizes = {
            name: sum(
                p.numel()
                for p in ttft_models.AutoModelForCausalLM.from_config(
                    ttft.configuration(name, "full")
                ).parameters()
            )
            for name in ttft.MODELS
        }
    assert {name: round(size / 1e9, 2) for name, size in sizes.items()} == {
        "llama": 8.03,
        "qwen2": 7.62,
    }


def test_weights_are_random_and_nothing_is_left_unset():
    model = ttft.build(ttft.configuration("qwen2", "small", layers=1), CPU)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().float()
    assert weight.std() == pytest.approx(ttft_models.DEVIATION, rel=0.05)
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device == CPU
        assert tensor.isfinite().all()
    assert len(model.model.layers) == 1
    tokens = torch.zeros(1, 8, dtype=torch.long)
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_decode_step_reads_the_cache_behind_the_prompt():
    model = ttft.build(ttft.configuration("llama", "small", layers=1), CPU)
    prompt = torch.randint(0, 512, (1, 24))
    session = ttft.Session.of(model, "eager", prompt)
    with torch.inference_mode():
        found = []
        for _ in range(2):
            session.rewind()
            found.append(session.decode())
    assert torch.equal(*found)
    assert session.cache.layers[0].cumulative_length == 25
    assert session.cache.layers[0].keys[:, :, 25:].abs().sum() > 0  # room that is masked


@pytest.mark.usefixtures("inductor")
def test_rows_and_ratios(monkeypatch):
    for way, arguments in ttft.WAYS.items():
        if way.startswith("amber"):  # the same, uncompiled
            monkeypatch.setitem(ttft.WAYS, way, {**arguments, "backend": "amber_eager"})
    small = ["--config", "small", "--layers", "1", "--models", "llama", "--tokens", "32"]
    ways = ["eager", *(way for way in ttft.WAYS if way.startswith("amber"))]
    arguments = ttft.parse([*small, "--ways", *ways, "--rounds", "1"])
    with torch.inference_mode():
        rows = list(ttft.rows(arguments, CPU))
    assert [row["way"] for row in rows] == ways
    assert not [row for row in rows if "error" in row]
    assert rows[1]["coverage"] > 0
    for row in rows[2:]:
        if "note" in row:  # of an option that is not there yet
            assert "quantize" in row["note"]
        else:
            assert (row["coverage"] > 0) == (row["way"] != "amber W8A8")
    assert "prefill_ratio" not in ttft.with_ratios(rows)[0]  # nothing of Inductor's to compare with
    count = len(rows)
    rows.append({**rows[0], "way": "compile", "prefill": 2 * rows[0]["prefill"]})
    assert ttft.with_ratios(rows)[0]["prefill_ratio"] == pytest.approx(2)
    assert ttft.table(ttft.with_ratios(rows)).row_count == count + 1


def test_weights_are_made_again_where_a_way_releases_them(monkeypatch):
    built = []

    def build(config, device):
        built.append(config)
        return object()

    monkeypatch.setattr(ttft, "build", build)
    monkeypatch.setattr(ttft, "measure", lambda model, *rest: {})
    monkeypatch.setattr(ttft, "releases_weights", lambda way: way == "amber int8 decode")
    ways = ["--ways", "amber int8 decode", "amber", "--tokens", "8", "16"]
    arguments = ttft.parse(["--config", "small", "--models", "llama", *ways])
    assert len(list(ttft.rows(arguments, CPU))) == 4
    assert len(built) == 1 + 2


def test_token_counts_follow_the_configuration():
    assert ttft.parse([]).tokens == [2048, 8192]
    assert ttft.parse(["--config", "small"]).tokens == [128]
    assert ttft.parse(["--tokens", "64"]).tokens == [64]


def test_whole_models_want_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ttft.py", "--device", "cpu"])
    assert ttft.main() == 1
    assert "PyTorch sees none here" in capsys.readouterr().out
