"""Two processes that share the data decide what one process decides, and fail together."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from toy import SITES, Toy, calibrate_as_rank, text

from amber_compile.calibration import calibrate, distributed
from amber_compile.plan import Plan

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their plans, and what they said of a failure."""
    path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(calibrate_as_rank, (2, str(path)), nprocs=2)
    return path


def test_two_processes_plan_what_one_does(folder: Path) -> None:
    alone = calibrate(Toy(), text(7), coverage=0.5, progress=False)
    plans = [Plan.load(folder / f"{rank}.plan") for rank in (0, 1)]
    for plan in plans:
        assert plan.sites == alone.sites
        for name in SITES:
            held = {kind: plan.tensors.get(name, kind) for kind in plan.tensors.names(name)}
            assert set(held) == set(alone.tensors.names(name))
            for kind, tensor in held.items():
                expected = alone.tensors.get(name, kind)
                if kind == "factor":  # float64 sums in another order, rounded to float32
                    assert torch.allclose(tensor, expected, rtol=2**-23, atol=0)
                else:  # a rounding of float32 for each batch and step of tuning
                    steps, batches = 40, 6
                    bound = steps * batches * 2**-24 * expected.abs().max()
                    assert (tensor - expected).abs().max() <= bound
                assert torch.equal(tensor, plans[0].tensors.get(name, kind))
    assert any(plans[0].tensors.names(name) for name in SITES)


def test_an_error_on_one_rank_is_one_on_all(folder: Path) -> None:
    said = [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[1].startswith("IndexError")
    assert said[0].startswith("CalibrationError: rank 1 failed: IndexError")


def test_one_process_is_rank_0_of_1() -> None:
    assert (distributed.rank(), distributed.ranks()) == (0, 1)
    assert distributed.share("abc") == [(0, "a"), (1, "b"), (2, "c")]
    value = {"a": torch.arange(3.0, dtype=torch.float64)}
    assert torch.equal(distributed.sums(value)["a"], value["a"])
    assert torch.equal(distributed.maxima(value)["a"], value["a"])
