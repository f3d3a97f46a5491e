"""A model that transformers spreads (``tp_plan="auto"``) answers, and writes, as on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gated import same
from ranks import run
from tp_llama_work import ALL, answer, as_rank, made, written

OLD = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this PyTorch has no gloo",
    ),
    pytest.mark.skipif(OLD, reason="tested with the transformers of PyTorch 2.13 only"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models lie."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "mixtral"):
        made(kind).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def alone() -> Any:
    """What one process answers, and writes."""
    torch.set_num_threads(1)
    model = made("llama")
    return answer(model, ALL), written(model)


def test_two_processes_do_what_one_does(saved: Path, alone: Any, tmp_path: Path) -> None:
    expected, (tokens, decided) = alone
    for found, wrote in run(as_rank, 2, tmp_path, "llama", saved / "llama", ALL, True):
        _agree(found, expected)
        assert wrote == (tokens, decided)
    assert decided["model.layers.1.mlp.down_proj"].startswith("dense: skip=")
    assert decided["model.layers.0.mlp.down_proj"].startswith("2:4")


def test_four_processes_do_what_one_does(saved: Path, alone: Any, tmp_path: Path) -> None:
    for found, _ in run(as_rank, 4, tmp_path, "llama", saved / "llama", ALL, False):
        _agree(found, alone[0])


def test_experts_spread_over_processes(saved: Path, tmp_path: Path) -> None:
    expected = answer(made("mixtral"), {})
    gate = expected[1]["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate == "2:4, weight_norm, norm correction, gate half only"
    for found, _ in run(as_rank, 2, tmp_path, "mixtral", saved / "mixtral", {}, False):
        _agree(found, expected)


def _agree(found: Any, expected: Any) -> None:
    logits, decided, coverage = found
    assert decided == expected[1]
    assert coverage == expected[2]
    assert same(logits, expected[0])
