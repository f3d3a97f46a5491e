"""What the tests of operators share: the implementations under test, and equality bit for bit."""

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch

from amber_compile.kernels.cpu_library import cpu_library
from amber_compile.kernels.nm_quantize import launch as launch_quantize
from amber_compile.kernels.nm_quantize import nm_quantize_reference
from amber_compile.kernels.nm_select import launch, nm_select_reference

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Select = Callable[..., torch.Tensor]
Quantize = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=["reference", "cpp"])
def select(request: pytest.FixtureRequest) -> Select:
    """The selection on a CPU, as either implementation: ``select(x, factor, n, m, …)``."""
    if request.param == "reference":
        return nm_select_reference
    return partial(launch, _library())


@pytest.fixture(params=["reference", "cpp"])
def quantize(request: pytest.FixtureRequest) -> Quantize:
    """Int8 codes on a CPU: ``quantize(x, factor, smooth, n, m, correction, prefix, offsets)``."""
    if request.param == "reference":
        return _quantize_reference
    return partial(launch_quantize, _library())


def _quantize_reference(x, factor, smooth, n, m, correction=None, dense_prefix=0, offsets=None):
    options = (correction, dense_prefix, 0, offsets)
    return nm_quantize_reference(x, factor, smooth, n, m, "int8", *options)


def _library() -> ctypes.CDLL:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = cpu_library()
    if library is None:
        pytest.skip("waits for a C++ compiler")
    return library


@pytest.fixture
def assert_same_bits() -> Callable[[torch.Tensor, torch.Tensor], None]:
    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        integer = INTEGERS[actual.dtype.itemsize]
        differ = actual.contiguous().view(integer) != expected.contiguous().view(integer)
        assert not differ.any(), f"differ at {differ.nonzero()[:5].tolist()}"

    return check


@pytest.fixture
def start_python() -> Callable[..., "subprocess.Popen[str]"]:
    """Start a Python process that runs some code, warnings being errors, in an environment."""

    def start(code: str, **environment: object) -> "subprocess.Popen[str]":
        imports = "import os, re, torch\nfrom amber_compile.kernels import cpu_kernel, nm_select\n"
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", imports + code],
            env={**os.environ, **{name: str(value) for name, value in environment.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
