"""The PTX of the mma.sp kernel on NumPy: what Triton has made of its layouts and addresses."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from products import KINDS, assert_computes, problem, scales
from ptx_machine import PtxKernel

from amber_compile.kernels.cuda import mma_sp
from amber_compile.kernels.cuda.mma_sp_layout import CONFIGURATIONS, Configuration

LARGEST = CONFIGURATIONS[0]
SMALL = Configuration(32, 32, stages=3)
LONG = Configuration(32, 64, stages=3, warps_m=1, warps_n=4, words=32)


@pytest.fixture
def launch(monkeypatch):
    """Return ``launch(target, tile, *operands)``: the launcher, its kernel's PTX on NumPy."""

    def run(target, tile, *operands):
        kernel = PtxKernel(original, target)
        monkeypatch.setattr(mma_sp, "mma_sp_kernel", kernel)
        monkeypatch.setattr(mma_sp, "choose", lambda *problem: tile)
        y = mma_sp.launch(*operands)
        assert kernel.conflicts == 0, "ldmatrix waits for banks"
        return y

    original = mma_sp.mma_sp_kernel
    monkeypatch.setattr(mma_sp, "shared_memory", lambda device: 0)
    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("target", "tile"),
    [("sm_80", LARGEST), ("sm_80", SMALL), ("sm_120", LONG)],
    ids=["largest", "small", "long stages"],
)
def test_agrees(launch, kind, target, tile):
    tokens, outputs = tile.rows - 7, tile.columns - 8
    operands = (*problem(kind, tokens, outputs, 192), *scales(tokens, outputs))
    assert_computes(launch(target, tile, *operands, torch.bfloat16), torch.bfloat16, *operands)


def test_every_program_finds_its_tile(launch):
    operands = problem("int8", 75, 72, 448)
    result = launch("sm_86", SMALL, *operands, None, None, None, torch.float32)
    assert_computes(result, torch.float32, *operands)
