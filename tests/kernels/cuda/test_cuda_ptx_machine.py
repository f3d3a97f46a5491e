"""The machine that runs PTX: a correct kernel runs, and planted faults are found."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from ptx_machine import PtxKernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from amber_compile.kernels.cuda.gluon import block_barrier, copy_async

LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [1, 1], [1, 0]))
FRAGMENT = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [], [], [16, 4])
)


@gluon.jit
def doubled(x_ptr, y_ptr, rows, WAIT: gl.constexpr, SWIZZLE: gl.constexpr, MASK: gl.constexpr):
    """y[row] = 2 x[row] for words [rows, 4] that go through shared memory of 32 words a row."""
    tile = gl.allocate_shared_memory(
        gl.int32, [16, 32], gl.SwizzledSharedLayout(4, 1, SWIZZLE, [1, 0])
    )
    row = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))[:, None]
    word = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    copy_async(tile, x_ptr + row * 32 + word, mask=(row < rows) & (word < 32))
    async_copy.commit_group()
    if WAIT:
        async_copy.wait_group(0)
    block_barrier()
    x = tile.slice(4, 4, 1).load(FRAGMENT)
    row = gl.program_id(0) * 16 + gl.arange(0, 16, gl.SliceLayout(1, FRAGMENT))[:, None]
    word = gl.arange(0, 4, gl.SliceLayout(0, FRAGMENT))[None, :]
    if MASK:
        gl.store(y_ptr + row * 4 + word, x + x, mask=row < rows)
    else:
        gl.store(y_ptr + row * 4 + word, x + x)


@pytest.fixture
def run():
    """Return ``run(rows, ...)``, which runs ``doubled`` on [rows, 32] and checks its answer."""

    def run(rows, wait=True, swizzle=8, mask=True):
        x = torch.arange(rows * 32, dtype=torch.int32).view(rows, 32)
        y = torch.zeros(rows, 4, dtype=torch.int32)
        kernel = PtxKernel(doubled, "sm_80")
        kernel[(1,)](x, y, rows, WAIT=wait, SWIZZLE=swizzle, MASK=mask, num_warps=1)
        return torch.equal(y, 2 * x[:, 4:8]), kernel.conflicts

    return run


@pytest.mark.parametrize("rows", [16, 11])
def test_a_correct_kernel_runs(run, rows):
    assert run(rows) == (True, 0)


def test_a_copy_that_is_not_waited_for_leaves_garbage(run):
    assert run(16, wait=False)[0] is False


def test_bank_conflicts_are_counted(run):
    correct, conflicts = run(16, swizzle=1)
    assert correct
    assert conflicts == 2 * 7, "eight rows of each of two matrices lie in the same banks"


def test_stores_outside_of_a_tensor_are_found(run):
    with pytest.raises(IndexError, match="global memory"):
        run(11, mask=False)
