"""Weights spread over 2 and 4 processes (``DTensor``) are sparsified as one process does it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import Gated, Layers, compiled, decisions, same, seeded, tokens
from ranks import run
from sharded_work import (
    CASES,
    activations,
    by_inductor,
    errors,
    factors,
    near_misses,
    parallel,
    selected,
    weights_and_places,
    written,
)

import amber_compile
from amber_compile.scores import robust_norm

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)

OLD = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
needs_2_13 = pytest.mark.skipif(OLD, reason="DTensor of PyTorch 2.11 lacks what the test sets up")

CUT = "K = 96 is cut for 4 processes, and 96 / 4 is not a multiple of M = 16"


ON_FOUR = ["norm", "variance", "cut"]
CASES_OF_RANKS = [(2, case) for case in CASES if case not in ("cut", "int8")]
CASES_OF_RANKS += [(4, "norm"), (4, "variance")]


@pytest.fixture(scope="module")
def answers_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """What each of 2, or of 4, processes answers and decides under each of their cases."""

    @functools.cache
    def answers(ranks: int) -> Any:
        cases = list(CASES) if ranks == 2 else ON_FOUR
        return run(parallel, ranks, tmp_path_factory.mktemp("parallel"), cases)

    return answers


@pytest.mark.parametrize(("ranks", "case"), CASES_OF_RANKS)
def test_processes_answer_what_one_does(
    answers_of: Callable[[int], Any], ranks: int, case: str
) -> None:
    model = compiled(seeded(Layers(2)), CASES[case])
    with torch.no_grad():
        expected, dense = model(tokens()), seeded(Layers(2))(tokens())
    assert same(dense, expected) == (case == "few tokens")
    answers = answers_of(ranks)
    for rank in answers:
        answer, decided = rank[case]
        assert same(answer, expected)
        assert decided == decisions()
        assert torch.equal(answer, answers[0][case][0])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_group_of_m_that_processes_would_share_stays_dense(
    answers_of: Callable[[int], Any], ranks: int
) -> None:
    for rank in answers_of(ranks):
        decided = rank["cut"][1]
        assert decided["layers.1.gate_proj"].startswith("8:16")
        expected = f"dense: {CUT}" if ranks == 4 else "8:16, robust_norm, norm correction"
        assert decided["layers.1.down_proj"] == expected


def test_spread_weights_stay_as_they_are_and_are_sparse(answers_of: Callable[[int], Any]) -> None:
    model = compiled(seeded(Layers(2)), CASES["norm"])
    with torch.no_grad():
        expected = model(tokens())
    for rank in answers_of(2):
        answer, decided = rank["int8"]
        assert same(answer, expected)
        assert set(decided.values()) == {"2:4, robust_norm, norm correction"}


def test_a_slice_is_selected_and_scaled_as_the_whole(tmp_path: Path) -> None:
    for found in run(selected, 2, tmp_path):
        for (dtype, correction), parts in found.items():
            x, factor = activations(dtype)
            whole = torch.ops.amber.nm_select(x, factor, 2, 4, correction, 1)
            part = whole.chunk(2, -1)[parts[0]]
            assert torch.equal(parts[1] == 0, part == 0)
            special = ~x.float().square().sum(-1).isfinite()
            special[0] = True  # the dense prefix
            assert special.sum() == 4
            assert torch.equal(parts[1][special].nan_to_num(1.5), part[special].nan_to_num(1.5))
            # the scale is rounded to float32 twice, sums of 32 in another order, and then to dtype
            bound = 32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
            off = (parts[1] - part).abs() <= bound * part.abs()
            assert off[~special].all()


@needs_2_13
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_factor_is_the_part_of_that_of_the_whole_weight(ranks: int, tmp_path: Path) -> None:
    found = run(factors, ranks, tmp_path)
    for at, (weight, places) in enumerate(weights_and_places()):
        whole = robust_norm(weight) if weight.dim() == 2 else _of_experts(weight)
        cut = _cut_of(weight, places)
        for rank in range(ranks):
            part = whole if cut is None else whole.chunk(ranks, cut)[rank]
            assert torch.equal(found[rank][at], part)


def _of_experts(weight: torch.Tensor) -> torch.Tensor:
    return torch.stack([robust_norm(one) for one in weight])


def _cut_of(weight: torch.Tensor, places: Any) -> int | None:
    """Return the dimension of the factor that is spread: that of channels, or of experts."""
    dim = getattr(places, "dim", None)
    if dim == weight.dim() - 1:
        return weight.dim() - 2
    return 0 if dim == 0 and weight.dim() == 3 else None


def test_every_write_to_a_part_is_seen(tmp_path: Path) -> None:
    found = run(written, 2, tmp_path)
    for seed in range(4):
        torch._dynamo.reset()
        model = compiled(seeded(Gated(), seed), {"projections": ["*"], "score": "robust_norm"})
        with torch.no_grad():
            expected = model(tokens())
        assert all(same(rank[seed], expected) for rank in found)


@needs_2_13
def test_operands_that_do_not_match_stay_dense(tmp_path: Path) -> None:
    for found in run(near_misses, 2, tmp_path):
        sparse = "2:4, weight_norm, norm correction"
        assert found["matched"] == found["replicated"] == sparse
        assert found["local rows"] == found["local channels"] == sparse
        assert found["tokens"] == "dense: its tokens are spread over processes"
        assert "laid out as (Partial(sum),)" in found["partial"]
        assert "laid out as (Replicate(),), its weight as (Shard(dim=1),)" in found["whole x"]
        assert "20 / 2 is not a multiple of M = 4" in found["uneven"]
        assert "a plain tensor, may be a shard" in found["plain"]


@pytest.mark.slow
def test_inductor_compiles_the_collectives(tmp_path: Path) -> None:
    model = compiled(seeded(Gated()), CASES["norm"])
    with torch.no_grad():
        expected = model(tokens())
    assert all(same(answer, expected) for answer in run(by_inductor, 2, tmp_path, seconds=300))


@needs_2_13
def test_check_measures_the_errors_of_one_process(tmp_path: Path) -> None:
    found = run(errors, 2, tmp_path)
    model = compiled(seeded(Gated()), {**CASES["norm"], "check": True})
    with torch.no_grad():
        model(tokens())
    expected = {site.name: site.error for site in amber_compile.last_reports()[-1].sites}
    for rank in found:
        assert {name for name, _ in rank} == set(expected)
        for name, error in rank:
            assert error == pytest.approx(expected[name], rel=2**-10)
