"""The mma.sp kernel, its body unchanged, on NumPy; against the definition of nm_matmul.

Not tested here is what Triton makes of it: test_cuda_mma_sp_aot.py.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from numpy_gluon import NumpyKernel
from products import KINDS, assert_computes, problem, scales

from amber_compile.kernels.cuda import mma_sp
from amber_compile.kernels.cuda.mma_sp_layout import CONFIGURATIONS, Configuration, choose

RESULTS = (torch.bfloat16, torch.float16, torch.float32)
SMALL = Configuration(32, 32, stages=3)
LONG = Configuration(32, 32, stages=3, words=32)  # 128 channels of 16 bit, 256 of 8
SHARED_MEMORY = 99 << 10


@pytest.fixture
def launch(monkeypatch):
    """Return ``launch(tile, *operands)``: the launcher with a given tile, its kernel on NumPy."""

    def run(tile, *operands):
        monkeypatch.setattr(mma_sp, "choose", lambda *problem: tile)
        return mma_sp.launch(*operands)

    monkeypatch.setattr(mma_sp, "mma_sp_kernel", NumpyKernel(mma_sp.mma_sp_kernel))
    monkeypatch.setattr(mma_sp, "shared_memory", lambda device: SHARED_MEMORY)
    return run


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", CONFIGURATIONS, ids=lambda t: f"{t.rows}x{t.columns}x{t.stages}")
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_agrees(launch, kind, tile):
    tokens, outputs = tile.rows + 9, tile.columns + 8
    operands = (*problem(kind, tokens, outputs, 192), *scales(tokens, outputs))
    result = launch(tile, *operands, torch.float16)
    assert_computes(result, torch.float16, *operands)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("outputs", [8, 32, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_tails_of_tokens_and_outputs(launch, kind, tokens, outputs):
    operands = problem(kind, tokens, outputs, 64)
    result = launch(SMALL, *operands, None, None, None, torch.float32)
    assert_computes(result, torch.float32, *operands)


@pytest.mark.parametrize("blocks", range(1, 11))
@pytest.mark.parametrize("tile", [SMALL, LONG], ids=["short stages", "long stages"])
@pytest.mark.parametrize("kind", KINDS)
def test_tails_of_channels(launch, kind, tile, blocks):
    operands = problem(kind, 17, 40, 64 * blocks)
    result = launch(tile, *operands, None, None, None, torch.float32)
    assert_computes(result, torch.float32, *operands)


def test_every_program_has_a_tile_of_its_own(launch):
    operands = problem("int8", 32 * 10 + 1, 32 * 3 - 8, 64)
    assert_computes(launch(SMALL, *operands), torch.bfloat16, *operands)


def test_no_tokens(launch):
    values, metadata, weight = problem("bf16", 16, 24, 64)
    assert launch(SMALL, values[:0], metadata[:0], weight).shape == (0, 24)


# ---- what follows the sums -----------------------------------------------------------------------


@pytest.mark.parametrize("result", RESULTS, ids=str)
@pytest.mark.parametrize("bias", [None, "result", "float32"])
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_scales_and_bias(launch, kind, bias, result):
    tokens, outputs = 33, 40
    offset, row, column = scales(tokens, outputs, torch.float32 if bias == "float32" else result)
    offset = offset if bias else None
    for with_row, with_column in itertools.product((None, row), (None, column)):
        operands = (*problem(kind, tokens, outputs, 64), offset, with_row, with_column)
        assert_computes(launch(SMALL, *operands, result), result, *operands)


def test_results_have_the_type_of_values_or_bf16(launch):
    for kind, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        assert launch(SMALL, *problem(kind, 16, 8, 64)).dtype == dtype
    assert launch(SMALL, *problem("int8", 16, 8, 64)).dtype == torch.bfloat16


def test_a_token_that_is_not_finite_spoils_no_other(launch):
    values, metadata, weight = problem("bf16", 20, 16, 64)
    values[3, 0], values[19, 5] = float("nan"), float("inf")
    y = launch(SMALL, values, metadata, weight)
    assert y[3].isnan().all()
    assert not y[19].isfinite().any()
    others = [row for row in range(20) if row not in (3, 19)]
    values[3, 0] = values[19, 5] = 0
    assert torch.equal(y[others], launch(SMALL, values, metadata, weight)[others])


def test_int32_sums_reach_their_extremes(launch):
    values, metadata, weight = problem("int8", 16, 8, 256)
    values.fill_(-127)
    weight.fill_(-128)
    operands = (values, metadata, weight)
    y = launch(LONG, *operands, None, None, None, torch.float32)
    assert (y == 128 * 127 * 128).all()


# ---- operands ------------------------------------------------------------------------------------


def test_strided_operands_are_copied(launch):
    values, metadata, weight = problem("int8", 16, 16, 128)
    wide = torch.zeros(16, 128, dtype=torch.int8)
    wide[:, ::2] = values
    column = torch.rand(16, 2)[:, 0]
    operands = (wide[:, ::2], metadata, weight.T.contiguous().T, None, None, column)
    assert_computes(launch(SMALL, *operands), torch.bfloat16, *operands)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_against_ordinary_operands(kind):
    assert mma_sp.why_not(*problem(kind, 16, 8, 64)) is None


def test_fp8_is_declined():
    values, metadata, weight = problem("int8", 16, 8, 64)
    fp8 = (values.to(torch.float8_e4m3fn), metadata, weight.to(torch.float8_e4m3fn))
    assert "fp8" in mma_sp.why_not(*fp8)


def test_other_types_are_declined():
    values, metadata, weight = problem("bf16", 16, 8, 64)
    assert "torch.float32" in mma_sp.why_not(values.float(), metadata, weight.float())


def test_sums_that_may_overflow_are_declined():
    values, metadata, weight = problem("int8", 1, 8, 64)
    assert mma_sp.why_not(values, metadata, weight.expand(8, 64).repeat(1, 1 << 12)) is None
    assert "262208" in mma_sp.why_not(values, metadata, weight.repeat(1, (1 << 12) + 1))


def test_no_channels_are_declined():
    values, metadata, weight = problem("bf16", 16, 8, 64)
    assert "no channels" in mma_sp.why_not(values[:, :0], metadata[:, :0], weight[:, :0])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_operands_off_the_16_byte_grid_are_declined(place):
    operands = list(problem("bf16", 16, 8, 64))
    good = operands[place]
    moved = torch.empty(good.numel() + 1, dtype=good.dtype)[1:].view(good.shape).copy_(good)
    operands[place] = moved
    assert "16 bytes" in mma_sp.why_not(*operands)


# ---- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_tile_fits_and_keeps_the_device_busy(kind):
    for tokens, outputs in itertools.product((1, 64, 512, 2048, 8192), (8, 1024, 4096, 14336)):
        tile = choose(kind, tokens, outputs, SHARED_MEMORY)
        assert tile.shared_memory(kind) <= SHARED_MEMORY
        smallest = min(CONFIGURATIONS, key=lambda t: t.rows * t.columns)
        assert tile == smallest or -(-tokens // tile.rows) * -(-outputs // tile.columns) >= 128


def test_more_shared_memory_means_more_stages():
    small, large = (choose("bf16", 8192, 4096, kib << 10) for kib in (99, 163))
    assert (small.rows, small.columns) == (large.rows, large.columns) == (128, 128)
    assert small.stages < large.stages
