"""A process that has PyTorch and no Amber, and the library of operators it loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amber_compile.kernels.compilation import BuildError, find_compiler
from amber_compile.kernels.operator_library import build_operator_library

PRELUDE = """
import sys
sys.modules["amber_compile"] = None  # from now on importing it fails
import torch
torch.set_num_threads(1)
"""
EPILOGUE = """
assert sys.modules["amber_compile"] is None
assert not [name for name in sys.modules if name.startswith("amber_compile.")]
"""


def operator_library() -> Path:
    """Return the library of operators for this CPU; skip the test where it cannot be built."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(f"waits for a C++ compiler: {error}")
    return build_operator_library()


def start(code: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run ``code`` with ``arguments`` in a process of its own, isolated; warnings are errors."""
    changed = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **environment}  # no entry points of packages
    return subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code, *map(str, arguments)],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
        check=False,
    )


def run_torch_only(code: str, *arguments: object, **environment: str) -> str:
    """Run ``code`` where ``amber_compile`` cannot be imported; return what it prints and logs."""
    done = start(PRELUDE + code + EPILOGUE, *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
