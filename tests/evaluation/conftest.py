"""A small model, a small text, and what evaluating one on the other found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from zoo import VOCAB, ZOO

from amber_compile.evaluation import Evaluation, evaluate

LLAMA = replace(ZOO["llama"], config=ZOO["llama"].config | {"num_hidden_layers": 1})


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    """A layer of random weights; no test changes it."""
    return LLAMA.build()[0]


@pytest.fixture
def own_llama() -> nn.Module:
    """The same, to be changed."""
    return LLAMA.build()[0]


@pytest.fixture(scope="session")
def batches() -> list[Tensor]:
    """Six windows of 24 tokens, in two batches."""
    tokens = torch.randint(3, VOCAB, (6, 24), generator=torch.Generator().manual_seed(0))
    return list(tokens.split(3))


@pytest.fixture(scope="session")
def evaluated(llama: nn.Module, batches: list[Tensor]) -> Evaluation:
    """What 2:4 costs."""
    return evaluate(llama, iter(batches), pattern="2:4", progress=False)
