"""What the C++ kernel does to the process it runs in: threads, float environment, memory."""

import shutil
import textwrap

import pytest

from amber_compile.kernels import compilation

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, compilation.COMPILERS)), reason="waits for a C++ compiler"
)


def test_one_openmp_runtime_is_loaded(start_python):
    output, _ = start_python(
        textwrap.dedent("""
        torch.set_num_threads(2)
        nm_select(torch.randn(1024, 1024), None, 2, 4)
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if re.search("/lib[gi]?omp", line)}
        print(len(files))
        print(len(os.listdir("/proc/self/task")))
        """),
        AMBER_CPU_KERNEL="cpp",
    ).communicate()
    runtimes, threads = map(int, output.split())
    assert runtimes == 1
    assert threads >= 2


def test_denormals_count_whatever_the_process_has_set(start_python):
    """Threads born under flush-to-zero inherit it; the kernel's arithmetic must not."""
    output, _ = start_python(
        textwrap.dedent("""
        torch.set_num_threads(2)
        x = torch.randint(-99, 99, (512, 1024), dtype=torch.int32).abs().view(torch.float32)
        factor = torch.rand(1024) + 1
        plain = [nm_select(x[:50], f, 2, 4, c) for f in (None, factor) for c in (None, "norm")]
        assert torch.set_flush_denormal(True)
        flushed = [nm_select(x, f, 2, 4, c)[:50] for f in (None, factor) for c in (None, "norm")]
        bits = [[y.view(torch.int32).tolist() for y in ys] for ys in (plain, flushed)]
        print(bits[0] == bits[1], float(x[0, 0] + x[0, 1]))
        """),
        AMBER_CPU_KERNEL="cpp",
    ).communicate()
    assert output.strip() == "True 0.0"


def test_no_byte_beyond_the_arguments_is_touched(start_python):
    """Each argument lies at the end of readable memory."""
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

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels in (32, 36, 64, 96, 100):
                x, factor = torch.randn(3, channels).to(dtype), torch.rand(channels)
                for f in (None, factor):
                    expected = nm_select(x, f, 2, 4, "norm")
                    f = None if f is None else at_the_end(f)
                    assert torch.equal(nm_select(at_the_end(x), f, 2, 4, "norm"), expected)
        print("untouched")
        """),
        AMBER_CPU_KERNEL="cpp",
    )
    output, _ = process.communicate()
    assert (process.returncode, output.strip()) == (0, "untouched"), output
