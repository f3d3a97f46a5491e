"""What the Hopper kernel becomes for sm_90a: instructions, registers, shared memory.

Compiled ahead of time, so that neither Triton's nor ptxas' choices are a surprise on a GPU.
"""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from aot import SHARED_MEMORY, compile_for

from amber_compile.kernels.cuda import wgmma_sp, wgmma_sp_instruction, wgmma_sp_offsets
from amber_compile.kernels.cuda.tiles import TABLE
from amber_compile.kernels.cuda.wgmma_sp_instruction import (
    VALUES_LAYOUT,
    WEIGHT_LAYOUT,
    Tile,
)
from amber_compile.kernels.cuda.wgmma_sp_offsets import WrongOffsets, wrong_offsets

KINDS = {kind: dtype for dtype, kind in wgmma_sp.KINDS.items()}
RESULTS = {"bf16": "bf16", "fp16": "fp16", "int8": "bf16", "fp8": "fp32"}
OPCODES = {
    "bf16": "HGMMA.SP.64x{}x32.F32.BF16",
    "fp16": "HGMMA.SP.64x{}x32.F32",
    "int8": "IGMMA.SP.64x{}x64.S8.S8",
    "fp8": "QGMMA.SP.64x{}x64.F32.E4M3.E4M3",
}
POINTERS = ("bias_ptr", "row_scale_ptr", "col_scale_ptr")
ALIKE = ("fp16", "fp8")  # but for the instruction they are bf16 and int8
SHIPPED = [
    pytest.param(kind, row.tile, marks=[pytest.mark.slow] if kind in ALIKE else [])
    for row in TABLE
    for kind in row.kinds
]


def compile_kernel(kind, tile, result=None, without=()):
    result = result or RESULTS[kind]
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[result]
    arguments = {
        "values_tiles": f"tensordesc<i32[{tile.rows},16],{VALUES_LAYOUT!r}>",
        "weight_tiles": f"tensordesc<i32[{tile.columns},32],{WEIGHT_LAYOUT!r}>",
        "metadata_ptr": "*i32:16",
        "y_ptr": f"*{result}:16",
        "bias_ptr": f"*{result}:16",
        "row_scale_ptr": "*fp32:16",
        "col_scale_ptr": "*fp32:16",
        **dict.fromkeys(("tokens", "octets", "blocks"), "i32"),
    }
    constants = wgmma_sp.constants(tile, kind, getattr(wgmma_sp.torch, dtype))
    constants |= dict.fromkeys(without)
    arguments = {name: kind for name, kind in arguments.items() if name not in without}
    return compile_for("sm_90", wgmma_sp.wgmma_sp_kernel, arguments, constants, **wgmma_sp.OPTIONS)


def check(compiled, tile):
    assert compiled.spills == 0
    assert compiled.serialised == ()
    assert compiled.shared <= min(tile.bytes, SHARED_MEMORY["sm_90"])
    assert wrong_offsets(compiled.ptx, tile) is None


@pytest.mark.parametrize(("kind", "tile"), SHIPPED)
def test_a_shipped_tile(kind, tile):
    compiled = compile_kernel(kind, tile)
    check(compiled, tile)
    instructions = 2 * tile.strips * 2 * tile.pair  # warpgroups, strips, steps
    assert compiled.count(OPCODES[kind].format(tile.columns)) == instructions
    assert compiled.count("WARPGROUP.DEPBAR") == 2  # one wait a slot and warpgroup
    assert compiled.count("UTMALDG") == 2 * tile.pair
    size = 4 if RESULTS[kind] == "fp32" else 2
    assert compiled.wide_stores == tile.strips * tile.columns * size // 16  # 128 threads' each


@pytest.mark.parametrize(
    ("result", "without"), [("bf16", POINTERS), ("fp16", POINTERS[1:]), ("fp32", POINTERS[:0])]
)
def test_an_epilogue(result, without):
    tile = next(row.tile for row in TABLE if row.tile.columns == 256)
    check(compile_kernel("int8", tile, result, without), tile)


# ---- offsets -------------------------------------------------------------------------------------


def test_offsets_of_another_tile_are_wrong():
    tile = TABLE[0].tile
    ptx = compile_kernel("bf16", tile).ptx
    assert "copies go to [0, " in str(wrong_offsets(ptx, Tile(64, 4)))
    swapped = ptx.replace("global_smem;", "1024;")
    assert "copies go to [1024, " in str(wrong_offsets(swapped, tile))


def test_offsets_that_cannot_be_read_are_wrong():
    ptx = compile_kernel("bf16", TABLE[0].tile).ptx
    assert "cannot read" in str(wrong_offsets(ptx.replace("add.s32", "bfi.b32"), TABLE[0].tile))
    assert "copies go to []" in str(wrong_offsets("", TABLE[0].tile))


class Kernel:
    """A compiled kernel as Triton's launch returns it."""

    def __init__(self, ptx):
        self.hash, self.asm = str(id(self)), {"ptx": ptx}


def test_a_kernel_with_wrong_offsets_is_not_used():
    tile = TABLE[0].tile
    good = Kernel(compile_kernel("bf16", tile).ptx)
    wgmma_sp.check_offsets(good, tile)
    with pytest.raises(WrongOffsets, match="shared memory"):
        wgmma_sp.check_offsets(Kernel(""), tile)


def test_a_kernel_is_checked_once(monkeypatch):
    kernel = Kernel(compile_kernel("bf16", TABLE[0].tile).ptx)
    wgmma_sp.check_offsets(kernel, TABLE[0].tile)
    monkeypatch.setattr(wgmma_sp_offsets, "wrong_offsets", lambda *_: pytest.fail("checked twice"))
    wgmma_sp.check_offsets(kernel, TABLE[0].tile)


def test_the_shared_memory_of_a_block():
    assert SHARED_MEMORY["sm_90"] == wgmma_sp_instruction.SHARED_MEMORY
