"""The kernels under the Triton that machines with a GPU have, beside the one that tests pin.

    pip install --no-deps --target FOLDER triton==3.6.0
    AMBER_OTHER_TRITON=FOLDER pytest tests/kernels/cuda/test_cuda_versions.py

The two differ in names, in layouts and in what they compile to. So what compiles or emulates a
kernel runs once more, in a process that imports the other version.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OTHER = "3.6.0"
HERE = Path(__file__).parent
PATTERNS = (
    "test_cuda_*_aot.py",
    "test_cuda_*_ptx.py",
    "test_cuda_wgmma_sp.py",
    "test_cuda_mma_sp.py",
    "test_cuda_nm_*.py",
    "test_cuda_quantized_linear.py",
)
TOGETHER = ("-n", "2", "--dist", "loadfile")
PROGRAM = """
import sys, pytest, triton
print(triton.__version__, triton.__file__, flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture
def folder():
    """Return the folder that the other version is installed in."""
    if not (given := os.environ.get("AMBER_OTHER_TRITON")):
        pytest.skip(
            f"needs Triton {OTHER}: pip install --no-deps --target FOLDER triton=={OTHER}, "
            "and AMBER_OTHER_TRITON=FOLDER"
        )
    return Path(given).resolve()


@pytest.mark.slow
def test_kernels_pass_under_the_other_triton(folder):
    files = sorted({str(file) for pattern in PATTERNS for file in HERE.glob(pattern)})
    assert files
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-q", "-p", "no:cacheprovider", *TOGETHER, *files],
        env={**ours, "PYTHONPATH": path},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
    )
    header, _, report = result.stdout.partition("\n")
    version, _, file = header.partition(" ")
    assert version == OTHER
    assert Path(file).is_relative_to(folder)
    assert result.returncode == 0, report[-4000:] + result.stderr[-2000:]
    assert " passed" in report
