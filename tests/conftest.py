"""What all tests share: one torch thread, and nothing left over from the test before."""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from amber_compile.report import clear_reports

sys.path.insert(0, str(Path(__file__).parent / "models"))  # zoo, emulate, stack

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="amber-tests-"))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # small graphs: workers cost more


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Forget compiled graphs and reports, so that no test sees those of another."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    clear_reports()


@pytest.fixture(scope="session")
def inductor() -> None:
    """Import Inductor quietly: torch's own modules use what torch deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor.compile_fx  # noqa: F401  # imported for its effect
