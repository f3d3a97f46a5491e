"""What Gluon calls differently in Triton 3.6 and 3.9, and what our Gluon kernels share.

    3.6                                        3.9                       here
    tma.async_copy_global_to_shared            tma.async_load            copy_tile
    async_copy.async_copy_global_to_shared     async_copy.async_load     copy_async
    gl.thread_barrier                          gl.barrier                block_barrier

In 3.9 the old names of the copies still exist, but raise. In 3.6 the result type of inline assembly
must be written where it is called (``gl.float32``); a constexpr argument is refused.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
block_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def tile_place(tile, rows, columns, GROUP: gl.constexpr):
    """Return (row, column) of an output tile in an order that reuses the L2 cache.

    GROUP rows of tiles are walked column by column, so that what runs at the same time reads few
    rows of A and few of B.
    """
    group = tile // (GROUP * columns)
    height = gl.minimum(rows - group * GROUP, GROUP)
    within = tile % (GROUP * columns)
    return group * GROUP + within % height, within // height


@gluon.jit
def store_scaled(
    y, y_ptr, bias_ptr, row_scale_ptr, col_scale_ptr,  # sums; where to; vectors, each or None
    row, column, tokens, outputs,  # where the tile begins, where y ends
    RESULT: gl.constexpr,  # the type of y
    MATRIX: gl.constexpr,  # the layout of the sums as a matrix: theirs, with another name
    WIDE: gl.constexpr,  # a layout in which each thread has 16 consecutive bytes of results
):  # fmt: skip
    """Store round(y · row_scale[:, None] · col_scale[None, :] + bias), of what lies in y."""
    y = gl.convert_layout(y, MATRIX, assert_trivial=True).to(gl.float32)
    rows = row + gl.arange(0, y.shape[0], gl.SliceLayout(1, MATRIX))
    columns = column + gl.arange(0, y.shape[1], gl.SliceLayout(0, MATRIX))
    if row_scale_ptr is not None:
        y = y * gl.load(row_scale_ptr + rows, mask=rows < tokens, other=0.0)[:, None]
    if col_scale_ptr is not None:
        y = y * gl.load(col_scale_ptr + columns, mask=columns < outputs, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + columns, mask=columns < outputs, other=0.0)
        y = y + bias.to(gl.float32)[None, :]
    y = gl.convert_layout(y.to(RESULT), WIDE)
    rows = row + gl.arange(0, y.shape[0], gl.SliceLayout(1, WIDE))
    columns = column + gl.arange(0, y.shape[1], gl.SliceLayout(0, WIDE))
    y_ptrs = y_ptr + rows[:, None].to(gl.int64) * outputs + columns[None, :]
    gl.store(y_ptrs, y, mask=(rows < tokens)[:, None] & (columns < outputs)[None, :])
