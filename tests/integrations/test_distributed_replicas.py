"""FSDP2, DDP, DataParallel and the stages of a pipeline answer what one process answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gated import Layers, compiled, decisions, same, seeded, tokens
from ranks import run
from replicas_work import OPTIONS, SEEDS, both, data_parallel, fully_sharded, pipeline, stuck

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


def answer_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what one process answers, the whole compiled as one graph."""
    torch._dynamo.reset()
    with torch.no_grad():
        answer: torch.Tensor = compiled(model, OPTIONS)(x)
    return answer


@pytest.mark.parametrize("parts", ["layers", "whole"])
def test_fsdp_gathers_weights_and_factors_are_computed_once(parts: str, tmp_path: Path) -> None:
    found = run(fully_sharded, 2, tmp_path, parts)
    factors = 3 * 3 - 1  # one is skipped
    for passes in found:
        for seed, (answer, _, _) in zip(SEEDS, passes, strict=True):
            assert torch.equal(answer, answer_of(seeded(Layers(), seed), tokens()))
        assert [computed for _, computed, _ in passes] == [factors, 0, factors, factors]
        assert len({kept for _, _, kept in passes}) == 1


def test_fsdp_and_tensor_parallelism_on_four_processes(tmp_path: Path) -> None:
    for passes in run(both, 4, tmp_path):
        for seed, (own, answer, computed) in zip(SEEDS[1:3], passes, strict=True):
            assert same(answer, answer_of(seeded(Layers(), seed), tokens(own)))
            assert computed == 3 * 3 - 1


def test_ddp_compiled_with_its_wrapper(tmp_path: Path) -> None:
    for rank, (answer, decided) in enumerate(run(data_parallel, 2, tmp_path)):
        assert same(answer, answer_of(seeded(Layers()), tokens(rank)))
        assert sum(not how.startswith("dense") for how in decided.values()) == 8


def test_stages_of_a_pipeline_have_the_names_of_the_whole(tmp_path: Path) -> None:
    found = run(pipeline, 2, tmp_path)
    assert found[0][0] is None
    assert same(found[1][0], answer_of(seeded(Layers(4)), tokens()))
    expected = decisions()
    for rank, (_, decided) in enumerate(found):
        own = {f"layers.{2 * rank}", f"layers.{2 * rank + 1}"}
        assert decided == {
            name: how for name, how in expected.items() if name.rpartition(".")[0] in own
        }


def test_a_rank_that_others_wait_for_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] did not end within 2 s"):
        run(stuck, 2, tmp_path, seconds=2)


def test_data_parallel_without_a_gpu_runs_the_module() -> None:
    model = seeded(Layers())
    expected = answer_of(model, tokens())
    with torch.no_grad():
        assert torch.equal(torch.nn.DataParallel(model)(tokens()), expected)
