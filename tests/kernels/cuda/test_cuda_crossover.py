"""From how many tokens on a sparse product is used: a table that needs no Triton."""

import subprocess
import sys

import pytest

from amber_compile.kernels.cuda.crossover import NEVER, crossover

KINDS = ("bf16", "fp16", "int8", "fp8")


@pytest.mark.parametrize("kind", KINDS)
def test_small_projections_stay_dense(kind):
    assert crossover(kind, 1024, 4096) == NEVER
    assert crossover(kind, 4096, 64) == NEVER


@pytest.mark.parametrize(("kind", "tokens"), [("bf16", 2048), ("fp16", 2048), ("int8", 512)])
def test_large_projections_are_sparse_from_some_count_on(kind, tokens):
    assert crossover(kind, 4096, 4096) == tokens
    assert crossover(kind, 14336, 4096) <= tokens


def test_triton_is_not_needed():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from amber_compile.kernels.cuda.crossover import crossover\n"
        "print(crossover('bf16', 14336, 4096))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1024\n", done.stderr
