"""Every tile of the Hopper kernel on a GPU: the launcher alone would choose only some of them."""

import pytest
import torch
from gpu_problems import Problem

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from amber_compile.kernels.cuda import wgmma_sp
from amber_compile.kernels.cuda.tiles import TABLE
from amber_compile.kernels.cuda.wgmma_sp_instruction import Tile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned", "hopper")]

TILES = [(kind, row.tile) for row in TABLE for kind in row.kinds]


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is an instruction of compute capability 9.0")


@pytest.mark.parametrize("processors", [3, 132])
@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
def test_a_tile(monkeypatch, device, kind, tile, processors):
    """Tails in every dimension; with 3 programs each walks over several tiles."""
    monkeypatch.setattr(wgmma_sp, "choose", lambda *_: tile)
    monkeypatch.setattr(wgmma_sp, "multiprocessors", lambda _: processors)
    outputs = 3 * tile.columns + 8
    problem = Problem.random(0, kind, 3 * tile.rows - 59, outputs, 1984, device, "row col bias")
    y = wgmma_sp.launch(*problem.operands())
    assert problem.why_wrong(y) is None


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_any_number_of_stages(monkeypatch, device, stages):
    monkeypatch.setattr(wgmma_sp, "choose", lambda *_: Tile(128, stages))
    monkeypatch.setattr(wgmma_sp, "multiprocessors", lambda _: 2)
    problem = Problem.random(stages, "int8", 400, 392, 1088, device)
    assert problem.why_wrong(wgmma_sp.launch(*problem.operands())) is None
