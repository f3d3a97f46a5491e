"""Lets the tests import the benchmarks by name, as the benchmarks import one another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from gpu_operands import Inputs

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    """A small activation with a ragged token count, and its weight."""
    from gpu_operands import Inputs, Shape, Weights

    generator = torch.Generator().manual_seed(0)
    weights = Weights.random(Shape("tiny", 128, 144), torch.device("cpu"), generator)
    return Inputs.random(weights, 77, generator)
