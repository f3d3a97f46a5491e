"""The int8 kernels of ``quantized_linear`` answer like its reference, bit for bit."""

import ctypes
import platform
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from int8_problems import RESULTS, codes_of, prepared, problem

from amber_compile.kernels import cpu_library, int8_kernel
from amber_compile.kernels.compilation import compile_library, find_compiler
from amber_compile.kernels.quantized_linear import quantized_linear_reference

quantized_linear = torch.ops.amber.quantized_linear
# A library, what its compiler is told, and the kernel of it that is tested.
KERNELS = {
    "AVX-512 VNNI": ((), "AVX-512 VNNI"),
    "C++": ((), "C++"),
    "C++ of any CPU": (("-U__AVX512VNNI__", "-U__AVX2__", "-U__SSE2__"), "C++"),
    "AMX": (("-mamx-tile", "-mamx-int8"), "AMX"),
    "AMX, emulated": (("-DAMX_EMULATED",), "AMX"),
}

Product = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return ``build(flags)``: the library, compiled once with each set of flags more."""
    if cpu_library.cpu_library() is None:
        pytest.skip("waits for a C++ compiler")
    built = {(): cpu_library.cpu_library()}

    def build(flags):
        if flags not in built:
            one = replace(cpu_library.recipe(), flags=(*cpu_library.FLAGS, *flags))
            path = tmp_path_factory.mktemp("int8") / "kernels.so"
            compile_library(replace(one, folders=(sources,)), find_compiler(), path)
            built[flags] = ctypes.CDLL(str(path))
        return built[flags]

    sources = tmp_path_factory.mktemp("sources")
    for path in cpu_library.SOURCES.iterdir():
        if path.suffix == ".h" or path.name == "int8_gemm.cpp":
            shutil.copy(path, sources)
    return build


@pytest.fixture(params=KERNELS)
def product(request, library) -> Product:
    """``product(codes, row_scale, weight codes, weight_scale, bias, dtype)``, by each kernel."""
    flags, kernel = KERNELS[request.param]
    if request.param == "AMX" and platform.machine() != "x86_64":
        pytest.skip("waits for an x86 CPU")
    built = library(flags)
    if kernel not in int8_kernel.available(built):
        pytest.skip(f"waits for a CPU with {kernel}")

    def multiply(codes, row_scale, weight, *others):
        packed = int8_kernel.pack(built, weight)
        return int8_kernel.multiply(built, kernel, codes, row_scale, packed, *others)

    return multiply


# ---- kernels -------------------------------------------------------------------------------------

# One of everything; tails of tokens, channels and outputs; whole tiles; several blocks of tokens;
# several passes over the channels.
SIZES = [
    *((1, 1, 1), (2, 3, 31), (12, 64, 32), (13, 65, 33), (37, 200, 70), (32, 128, 64)),
    *((777, 64, 33), (25, 8200, 40)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernels_answer_like_the_reference(product, assert_same_bits, sizes, bias):
    arguments = problem(*sizes, bias)
    for dtype in RESULTS:
        expected = quantized_linear_reference(*prepared(*arguments), dtype)
        assert_same_bits(product(*arguments, dtype), expected)


@pytest.mark.parametrize("channels", [1, 1000, 16384])
def test_sums_are_those_of_whole_numbers(product, channels):
    codes, weight = codes_of(5, channels), codes_of(34, channels, seed=3)
    codes[0], codes[1], weight[0], weight[1] = 127, -127, 127, -127
    y = product(codes, torch.ones(5), weight, torch.ones(34), None, torch.float32)
    assert torch.equal(y, (codes.long() @ weight.long().T).float())


def test_the_largest_sums_fit(product):
    """And those on the way wrap: VNNI multiplies codes raised by 128."""
    codes = torch.tensor([[127], [-127], [-128]], dtype=torch.int8).expand(3, 1 << 17).contiguous()
    weight = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, 1 << 17).contiguous()
    y = product(codes, torch.ones(3), weight, torch.ones(2), None, torch.float32)
    exact = codes[:, :1].long() @ weight[:, :1].long().T << 17
    assert exact.abs().max() < 1 << 31 < 255 * 127 << 17
    assert torch.equal(y, exact.float())


@pytest.mark.parametrize("dtype", RESULTS)
def test_a_token_without_a_scale_has_no_results(product, dtype):
    codes, row, weight, column, bias = problem(14, 70, 37)
    row[3], row[13] = torch.nan, torch.inf
    codes[13] = 0
    y = product(codes, row, weight, column, bias, dtype)
    assert y[[3, 13]].isnan().all()
    assert y[[*range(3), *range(4, 13)]].isfinite().all()


@pytest.mark.parametrize("dtype", RESULTS)
def test_the_smallest_and_largest_results(product, assert_same_bits, dtype):
    """Denormals, zeros of both signs, what rounds to infinity."""
    codes, row, weight, column, _ = problem(40, 70, 37)
    codes[5] = 0
    row *= torch.logspace(-45, 36, 40)
    arguments = (codes, row, weight, column, None)
    expected = quantized_linear_reference(*prepared(*arguments), dtype)
    assert (expected == 0).any()
    assert (expected.signbit() & (expected == 0)).any()
    assert expected.isinf().any()
    assert_same_bits(product(*arguments, dtype), expected)
    torch.set_flush_denormal(True)
    try:
        assert_same_bits(product(*arguments, dtype), expected)
    finally:
        torch.set_flush_denormal(False)


def test_the_number_of_threads_changes_nothing(product, assert_same_bits):
    arguments = problem(300, 320, 100)
    one = product(*arguments, torch.bfloat16)
    torch.set_num_threads(4)
    assert_same_bits(product(*arguments, torch.bfloat16), one)


def test_no_byte_beyond_the_arguments_is_touched(start_python):
    """Each argument lies at the end of readable memory."""
    process = start_python(
        textwrap.dedent("""
        import ctypes, mmap
        from amber_compile.kernels import quantized_linear
        from amber_compile.kernels.prepared_weight import prepare_weight
        keep, libc = [], ctypes.CDLL(None)

        def at_the_end(tensor):
            size = -tensor.nbytes // mmap.PAGESIZE * -mmap.PAGESIZE
            memory = mmap.mmap(-1, size + mmap.PAGESIZE)
            keep.append(memory)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            assert libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
            begin = size - tensor.nbytes
            moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
            return moved.view(tensor.shape).copy_(tensor)

        for sizes in ((1, 1, 1), (13, 67, 33), (12, 64, 32)):
            tokens, channels, outputs = sizes
            codes = torch.randint(-127, 128, (tokens, channels), dtype=torch.int8)
            weight = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8)
            row, scale, bias = torch.rand(tokens), torch.rand(outputs), torch.rand(outputs)
            expected = quantized_linear(codes, row, prepare_weight(weight), scale, bias, row.dtype)
            packed = at_the_end(prepare_weight(at_the_end(weight)))
            y = quantized_linear(
                at_the_end(codes), at_the_end(row), packed, at_the_end(scale), at_the_end(bias),
                row.dtype,
            )
            assert torch.equal(y, expected)
        print("untouched")
        """),
        AMBER_CPU_KERNEL="cpp",
    )
    output, _ = process.communicate()
    assert (process.returncode, output.strip()) == (0, "untouched"), output
