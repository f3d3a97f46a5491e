"""The budgets of the GPU tests: kept by the reference, and by nothing that is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_problems import KINDS, Problem

CPU = torch.device("cpu")
TOKENS = 77


@pytest.fixture(params=KINDS)
def problem(request) -> Problem:
    return Problem.random(0, request.param, TOKENS, 136, 448, CPU, "row col bias")


def test_the_reference_is_right(problem):
    assert problem.why_wrong(problem.solve()) is None


@pytest.mark.parametrize("part", ["values", "metadata", "weight", "row_scale", "col_scale", "bias"])
def test_one_wrong_element_is_found_out(problem, part):
    operand = getattr(problem, part).clone()
    flat = operand.view(-1)
    place = 0 if part == "metadata" else -1  # the last words may be those of rows beyond T
    flat[place] = {"metadata": swapped(int(flat[place])), "values": 1}.get(part, 3)
    assert problem.why_wrong(replace(problem, **{part: operand}).solve()) is not None


def swapped(word: int) -> int:
    """Return a word of metadata whose first group keeps other channels: 0 and 1, or 2 and 3."""
    return word & ~0xF | (0xE if word & 0xF == 0x4 else 0x4)


def test_what_is_not_written_is_found_out(problem):
    y = problem.solve()
    y.view(torch.uint8)[-1, -2:] = 255
    assert "1 of" in str(problem.why_wrong(y))
    assert "shape" in str(problem.why_wrong(y[1:]))


@pytest.mark.usefixtures("poisoned")
def test_uninitialised_memory_is_poisoned():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        assert torch.empty(8, dtype=dtype).float().isnan().all()
        assert torch.zeros(8).to(dtype).new_empty(3, 2).float().isnan().all()
    assert (torch.empty_like(torch.zeros(8, dtype=torch.int32)) == -1).all()
    assert torch.empty(0).shape == (0,)
