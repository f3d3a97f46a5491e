"""``cpu/floats.h``: conversions as PyTorch makes them, over all values that could differ."""

import ctypes
import shutil
from dataclasses import replace

import pytest
import torch

from amber_compile.kernels import compilation, cpu_library

TYPES = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
LOWER_HALVES = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]

PROBE = """
#include "floats.h"

template <class T>
void widen(const typename T::Bits* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = T::template widen<float>(uint32_t(from[i]));
}
template <class T>
void narrow(const float* from, typename T::Bits* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = T::narrow(from[i]);
}
"""


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Return ``convert(function, type, values, dtype)``, by way of a library made of the header."""
    if not any(map(shutil.which, compilation.COMPILERS)):
        pytest.skip("waits for a C++ compiler")
    folder = tmp_path_factory.mktemp("floats")
    exports = [
        f'extern "C" void {function}_{name}({arguments}, int count) '
        f"{{ {function}<{name}>(from, to, count); }}"
        for name in TYPES.values()
        for function, arguments in (
            ("widen", f"const {name}::Bits* from, float* to"),
            ("narrow", f"const float* from, {name}::Bits* to"),
        )
    ]
    (folder / "probe.cpp").write_text(PROBE + "\n".join(exports))
    shutil.copy(cpu_library.SOURCES / "floats.h", folder)
    probe = replace(cpu_library.recipe(), folders=(folder,))
    compilation.compile_library(probe, compilation.find_compiler(), folder / "probe.so")
    library = ctypes.CDLL(str(folder / "probe.so"))

    def convert(function, dtype, values, into):
        result = torch.empty_like(values, dtype=into)
        pointers = map(ctypes.c_void_p, (values.data_ptr(), result.data_ptr()))
        getattr(library, f"{function}_{TYPES[dtype]}")(*pointers, values.numel())
        return result

    return convert


def float32_values():
    """Return every upper half of a float32 with the lower halves at which rounding changes."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)[:, None] << 16
    values = (upper | torch.tensor(LOWER_HALVES, dtype=torch.int32)).flatten().view(torch.float32)
    return values[~values.isnan()]


@pytest.mark.parametrize("dtype", TYPES)
def test_narrow_rounds_to_nearest_even(floats, assert_same_bits, dtype):
    values = float32_values()
    assert_same_bits(floats("narrow", dtype, values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_widen_is_exact(floats, assert_same_bits, dtype):
    values = float32_values() if dtype == torch.float32 else torch.arange(1 << 16).to(torch.int16)
    values = values.view(dtype)
    values = values[~values.isnan()]
    assert_same_bits(floats("widen", dtype, values, torch.float32), values.float())
