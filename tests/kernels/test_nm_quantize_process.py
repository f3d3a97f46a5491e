"""What the C++ kernel of ``nm_quantize`` does to its process: threads, floats, memory, build."""

import ctypes
import shutil
import textwrap

import pytest
import torch
from row_codes import CORRECTIONS, DTYPES, check, gaussian, has_compiler, oracle, positive

from amber_compile.kernels import cpu_library
from amber_compile.kernels.compilation import Recipe, compile_library, find_compiler
from amber_compile.kernels.nm_quantize import launch
from amber_compile.kernels.nm_select import nm_select_reference

nm_quantize = torch.ops.amber.nm_quantize


@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(correction, dtype):
    x, factor = gaussian(300, 1024, dtype=dtype), positive(1024)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = nm_quantize(x, factor, factor, 2, 4, "int8", correction)
        torch.set_num_threads(3)
        check(nm_quantize(x, factor, factor, 2, 4, "int8", correction), alone)
    finally:
        torch.set_num_threads(threads)


@has_compiler
def test_denormals_count_whatever_the_process_has_set(start_python):
    output, _ = start_python(
        textwrap.dedent("""
        torch.set_num_threads(2)
        quantize = torch.ops.amber.nm_quantize
        x = torch.randint(-99, 99, (512, 1024), dtype=torch.int32).abs().view(torch.float32)
        x[:, ::64] = 1e-37
        cases = [(n, m, s) for n, m in ((2, 4), (4, 8), (4, 4)) for s in (None, torch.ones(1024))]
        smooth = torch.full((1024,), 2.0 ** 8)
        plain = [quantize(x[:50], None, smooth, n, m)[0] for n, m, _ in cases]
        assert torch.set_flush_denormal(True)
        flushed = [quantize(x, None, smooth, n, m)[0][:50] for n, m, _ in cases]
        print(all(map(torch.equal, plain, flushed)), any(map(torch.any, plain)))
        """),
        AMBER_CPU_KERNEL="cpp",
    ).communicate()
    assert output.strip() == "True True"


@has_compiler
def test_no_byte_beyond_the_arguments_is_touched(start_python):
    """Each argument lies at the end of readable memory, and nothing is written after a result."""
    process = start_python(
        textwrap.dedent("""
        import ctypes, mmap
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

        real = torch.empty_like
        empty_like = lambda t, **options: at_the_end(real(t, **options))
        quantize = torch.ops.amber.nm_quantize
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels in (32, 36, 64, 96, 100):
                x, v = torch.randn(3, channels).to(dtype), torch.rand(channels)
                for n in (2, 4):
                    expected = quantize(x, v, v, n, 4, "int8", "norm")
                    torch.empty_like = empty_like
                    moved = at_the_end(x), at_the_end(v), at_the_end(v)
                    actual = quantize(*moved, n, 4, "int8", "norm")
                    torch.empty_like = real
                    assert all(map(torch.equal, actual, expected))
        print("untouched")
        """),
        AMBER_CPU_KERNEL="cpp",
    )
    output, _ = process.communicate()
    assert (process.returncode, output.strip()) == (0, "untouched"), output


@has_compiler
def test_no_instruction_set_is_needed(tmp_path):
    """The least registers there are give the same codes."""
    for source in cpu_library.SOURCES.iterdir():
        if source.suffix == ".h" or source.name.startswith("nm_"):
            shutil.copy(source, tmp_path)
    flags = tuple("-O1" if flag == "-O3" else flag for flag in cpu_library.FLAGS)
    path = tmp_path / "portable.so"
    compile_library(Recipe("cpu", (tmp_path,), flags, ((),)), find_compiler(), path)
    library = ctypes.CDLL(str(path))
    for dtype in DTYPES:
        x, factor, smooth = gaussian(3, 112, dtype=dtype), positive(112), positive(112, 2)
        for n, m in ((2, 4), (4, 8), (4, 4)):
            for s in (None, smooth):
                kept = nm_select_reference(x, factor, n, m)
                check(launch(library, x, factor, s, n, m), oracle(kept, s))
