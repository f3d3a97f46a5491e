"""Which int8 kernel a CPU runs: the best it has, or what the environment asks for."""

import ctypes
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels import cpu_library, int8_kernel, prepared_weight, quantized_linear

NUMBERS = int8_kernel.NUMBERS


@pytest.fixture(autouse=True)
def forget():
    """Choose anew, before and after."""
    int8_kernel._choose.cache_clear()
    yield
    int8_kernel._choose.cache_clear()


@pytest.fixture
def cpu_with(monkeypatch):
    """``cpu_with(kernels, damage)``: what this CPU has; AMX is plain C++, with some damage done."""
    real = cpu_library.cpu_library()
    if real is None:
        pytest.skip("waits for a C++ compiler")

    class Library:
        def __init__(self, kernels, damage):
            self.numbers = [NUMBERS[kernel] for kernel in kernels]
            self.damage = damage
            self.int8_has = self.numbers.__contains__
            self.int8_pack = real.int8_pack

        def int8_linear(self, problem, parallel):
            asked = problem._obj.kernel
            problem._obj.kernel = NUMBERS["C++"]
            real.int8_linear(problem, parallel)
            if asked == NUMBERS["AMX"]:
                ctypes.c_float.from_address(problem._obj.y + 4 * 45).value += self.damage

    def make(kernels, damage=0.0):
        library = Library(kernels, damage)
        monkeypatch.setattr(int8_kernel, "cpu_library", lambda: library)

    return make


@pytest.mark.parametrize(
    ("kernels", "best"),
    [
        (["C++"], "C++"),
        (["C++", "AVX-512 VNNI"], "AVX-512 VNNI"),
        (["C++", "AVX-512 VNNI", "AMX"], "AMX"),
    ],
)
def test_the_best_of_a_cpu_is_used(cpu_with, monkeypatch, kernels, best):
    monkeypatch.delenv("AMBER_INT8_KERNEL", raising=False)
    cpu_with(kernels)
    assert int8_kernel.int8_kernel() == best


def test_amx_that_errs_is_done_without(cpu_with, monkeypatch):
    monkeypatch.delenv("AMBER_INT8_KERNEL", raising=False)
    cpu_with(NUMBERS, damage=1.0)
    with pytest.warns(UserWarning, match="does without AMX: its product is wrong at 1 of 3375"):
        assert int8_kernel.int8_kernel() == "AVX-512 VNNI"
    assert int8_kernel.int8_kernel() == "AVX-512 VNNI"  # once is enough: a second one is an error


def test_amx_is_tried_with_real_tensors_while_a_graph_is_traced(cpu_with, monkeypatch):
    monkeypatch.delenv("AMBER_INT8_KERNEL", raising=False)
    cpu_with(NUMBERS)
    with FakeTensorMode():
        assert int8_kernel.int8_kernel() == "AMX"


@pytest.mark.parametrize("asked", int8_kernel.NAMES)
def test_a_kernel_can_be_asked_for(cpu_with, monkeypatch, asked):
    cpu_with(NUMBERS)
    monkeypatch.setenv("AMBER_INT8_KERNEL", asked)
    assert int8_kernel.int8_kernel() == int8_kernel.NAMES[asked]


def test_a_kernel_that_is_not_here_is_an_error(cpu_with, monkeypatch):
    cpu_with(["C++"])
    monkeypatch.setenv("AMBER_INT8_KERNEL", "amx")
    message = "AMBER_INT8_KERNEL='amx' is not on this CPU; valid here: cpp, reference"
    with pytest.raises(OptionError, match=re.escape(message)):
        int8_kernel.int8_kernel()


def test_an_unknown_kernel_is_an_error(monkeypatch):
    monkeypatch.setenv("AMBER_INT8_KERNEL", "sse")
    with pytest.raises(OptionError, match=r"AMBER_INT8_KERNEL 'sse'; .*amx, cpp, reference, vnni"):
        int8_kernel.int8_kernel()


@pytest.mark.parametrize("variable", ["AMBER_INT8_KERNEL", "AMBER_CPU_KERNEL"])
def test_without_kernels_the_reference_multiplies_what_is_not_packed(
    monkeypatch, assert_same_bits, variable
):
    codes = torch.arange(-48, 48, dtype=torch.int8).view(4, 24)
    scale = torch.rand(4)

    def product():
        weight = prepared_weight.prepare_weight(codes)
        return weight.shape, quantized_linear(codes, scale, weight, scale, None, torch.bfloat16)

    expected = product()[1]
    monkeypatch.setenv(variable, "reference")
    assert int8_kernel.int8_kernel() == "reference"
    shape, y = product()
    assert shape == codes.shape
    assert_same_bits(y, expected)
