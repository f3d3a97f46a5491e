"""The example with tensor parallelism, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.mark.slow
def test_the_example_finds_two_processes_to_answer_what_one_does() -> None:
    done = subprocess.run(
        [sys.executable, "examples/tensor_parallel.py"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "24 of 56 projections sparse" in done.stdout
    assert "down_proj is [256, 768], of which each process has [256, 384]" in done.stdout
    sizes = re.findall(r"^  (dense|sparse|what sparsity changes:) +(\S+)$", done.stdout, re.M)
    found = {name: float(size) for name, size in sizes}
    assert found["sparse"] < 2**-12 * found["what sparsity changes:"]
