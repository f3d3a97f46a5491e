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
