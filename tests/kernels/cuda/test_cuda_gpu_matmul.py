"""The sparse products on a GPU, through the operator and through each kernel, against fp64."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable

import pytest
import torch
from gpu_problems import BF16, FP16, FP32, KINDS, Problem

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

KERNELS = ("operator", "wgmma_sp", "mma_sp")
TOKENS = (1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 257, 300, 513)
OUTPUTS = (8, 16, 24, 64, 120, 128, 136, 248, 256, 264, 520)
CHANNELS = (64, 128, 192, 320, 448, 512, 1088, 2048)
EPILOGUES = ("", "row", "col", "bias", "row col", "row col bias", "bias32", "row col bias32")
RESULTS = (BF16, FP16, FP32)
SOME_EPILOGUES = [("row", FP32), ("col", BF16), ("row col bias", BF16), ("row col bias32", FP16)]
"""Each pair is one compilation; all of them are compiled by a slow test."""
RANDOM = 40
"""Random shapes for each kind and kernel."""


@pytest.fixture(params=KERNELS)
def solve(request: pytest.FixtureRequest) -> Callable[[Problem], torch.Tensor]:
    """Return a kernel, which skips problems that it says it has nothing for."""
    if request.param == "operator":
        return Problem.solve
    kernel = importlib.import_module(f"amber_compile.kernels.cuda.{request.param}")
    major, minor = torch.cuda.get_device_capability()
    if request.param == "wgmma_sp" and (major, minor) != (9, 0):
        pytest.skip(f"wgmma is an instruction of compute capability 9.0, not {major}.{minor}")

    def solve(problem: Problem) -> torch.Tensor:
        if reason := kernel.why_not(*problem.operands()):
            pytest.skip(reason)
        y: torch.Tensor = kernel.launch(*problem.operands())
        return y

    return solve


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 16, 77, 128, 300])
@pytest.mark.parametrize(("outputs", "channels"), [(8, 64), (264, 448), (256, 1024), (1024, 4096)])
def test_shapes(solve, device, kind, tokens, outputs, channels):
    problem = Problem.random(tokens, kind, tokens, outputs, channels, device)
    assert problem.why_wrong(solve(problem)) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_shapes(solve, device, kind):
    for seed in range(RANDOM):
        draw = random.Random(seed)
        sizes = draw.choice(TOKENS), draw.choice(OUTPUTS), draw.choice(CHANNELS)
        epilogue = draw.choice(EPILOGUES)
        problem = Problem.random(seed, kind, *sizes, device, epilogue)
        wrong = problem.why_wrong(solve(problem))
        assert wrong is None, f"seed {seed}, {sizes}, {epilogue!r}: {wrong}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("epilogue", "out_dtype"), SOME_EPILOGUES)
def test_epilogues(solve, device, kind, epilogue, out_dtype):
    problem = Problem.random(0, kind, 77, 136, 192, device, epilogue, out_dtype)
    y = solve(problem)
    assert y.dtype == out_dtype
    assert problem.why_wrong(y) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue(solve, device, kind, epilogue):
    for out_dtype in RESULTS:
        problem = Problem.random(0, kind, 77, 136, 192, device, epilogue, out_dtype)
        assert problem.why_wrong(solve(problem)) is None, out_dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_product(solve, device, kind):
    problem = Problem.random(0, kind, 2048, 4096, 4096, device)
    assert problem.why_wrong(solve(problem)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_change_from_run_to_run(solve, device, kind, assert_same_bits):
    problem = Problem.random(0, kind, 1024, 1024, 2048, device)
    first = solve(problem)
    for _ in range(20):
        assert_same_bits(solve(problem), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_scale_is_nan_and_no_other(solve, device, kind):
    problem = Problem.random(0, kind, 40, 64, 128, device, "row col")
    problem.row_scale[17] = float("nan")
    missing = solve(problem).isnan()
    assert missing[17].all()
    assert int(missing.sum()) == missing.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_products_beyond_4_gib(solve, device, kind):
    """Offsets of rows do not fit 32 bits."""
    if torch.cuda.mem_get_info(device)[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    problem = Problem.random(0, kind, 65552, 64, 64, device)
    wide = torch.cat([problem.weight.view(torch.uint8)] * 520).view(problem.weight.dtype)
    columns = None if problem.col_scale is None else problem.col_scale.repeat(520)
    large = Problem(kind, problem.values, problem.metadata, wide, None, problem.row_scale, columns)
    y = solve(large)
    assert y.numel() > 2**31
    last = Problem(
        kind,
        problem.values,
        problem.metadata,
        problem.weight,
        None,
        problem.row_scale,
        problem.col_scale,
    )
    assert last.why_wrong(y[:, -64:].contiguous()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(solve, device, kind):
    problem = Problem.random(0, kind, 0, 64, 128, device)
    assert solve(problem).shape == (0, 64)


def test_poisoned_memory_is_poisoned(device):
    for dtype in (BF16, FP16, FP32, torch.float8_e4m3fn):
        assert torch.empty(8, device=device, dtype=dtype).float().isnan().all()
    assert (torch.empty(8, device=device, dtype=torch.int32) == -1).all()
    assert torch.empty(8, device=device).new_empty(3).isnan().all()
