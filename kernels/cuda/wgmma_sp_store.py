"""How wgmma_sp.py stores what it has multiplied: scaled, with its bias, rounded, in wide pieces.

    y = round(acc · row_scale[:, None] · col_scale[None, :] + bias)

Results are only exchanged within quads of threads, so that each thread stores 16 consecutive bytes
and each quad 64. Triton does it by shuffles for results of 32 bits, and through 2 KiB of shared
memory a warpgroup for those of 16.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from amber_compile.kernels.cuda.gluon import store_scaled

# ---- layouts -------------------------------------------------------------------------------------


@gluon.constexpr_function
def matrix_layout(columns):
    """Layout of the accumulators of a strip as [64, columns]."""
    registers = [[0, 1], [8, 0], *_doubling(8, columns)]
    return _warpgroup_layout(registers, 2, columns)


@gluon.constexpr_function
def wide_layout(columns, bits):
    """Layout [64, columns] with 16 bytes of a row in each thread, 64 in each quad of threads.

    A warp has the rows that it has in ``matrix_layout``, a quad the row: only quads exchange.
    """
    run = 128 // bits
    registers = [*_doubling(1, run), [8, 0], *_doubling(4 * run, columns)]
    return _warpgroup_layout(registers, run, columns)


@gluon.constexpr_function
def _doubling(first, end):
    """Return the bases [0, first], [0, 2 · first], … below column ``end``."""
    return [[0, first << i] for i in range((end // first).bit_length() - 1)]


@gluon.constexpr_function
def _warpgroup_layout(registers, column, columns):
    lanes = [[0, column], [0, 2 * column], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


# ---- store ---------------------------------------------------------------------------------------


@gluon.jit
def store(
    acc, results, row, column, tokens, outputs,
    RESULT: gl.constexpr, STRIPS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Store the accumulators of a warpgroup, one strip after the other."""
    if STRIPS == 2:
        strips = gl.permute(gl.reshape(acc, [128, 2, COLUMNS // 2]), [0, 2, 1])
        upper, lower = gl.split(strips)
        store(upper, results, row, column, tokens, outputs, RESULT, 1, COLUMNS)
        store(lower, results, row + 64, column, tokens, outputs, RESULT, 1, COLUMNS)
    else:
        y = gl.reshape(acc, [4, 8, 4, COLUMNS // 8, 2, 2])  # w, g, t, i >> 2, i >> 1 & 1, i & 1
        y = gl.reshape(gl.permute(y, [0, 4, 1, 3, 2, 5]), [64, COLUMNS])
        _store_columns(y, results, row, column, tokens, outputs, RESULT, COLUMNS)


@gluon.jit
def _store_columns(
    y, results, row, column, tokens, outputs, RESULT: gl.constexpr, COLUMNS: gl.constexpr
):  # fmt: skip
    """Store y [64, COLUMNS], 64 columns after 64, since the scales of all take many registers."""
    if COLUMNS > 64:
        HALF: gl.constexpr = COLUMNS // 2
        left, right = gl.split(gl.permute(gl.reshape(y, [64, 2, HALF]), [0, 2, 1]))
        _store_columns(left, results, row, column, tokens, outputs, RESULT, HALF)
        _store_columns(right, results, row, column + HALF, tokens, outputs, RESULT, HALF)
    else:
        _store_part(y, results, row, column, tokens, outputs, RESULT, COLUMNS)


@gluon.jit
def _store_part(
    y, results, row, column, tokens, outputs, RESULT: gl.constexpr, COLUMNS: gl.constexpr
):  # fmt: skip
    """Scale, add the bias, round, and store, 16 bytes a thread."""
    y_ptr, bias_ptr, row_scale_ptr, col_scale_ptr = results
    MATRIX: gl.constexpr = matrix_layout(COLUMNS)
    WIDE: gl.constexpr = wide_layout(COLUMNS, RESULT.primitive_bitwidth)
    store_scaled(
        y, y_ptr, bias_ptr, row_scale_ptr, col_scale_ptr, row, column, tokens, outputs,
        RESULT, MATRIX, WIDE,
    )  # fmt: skip
