"""The instrument itself: what `aot.py` reports of kernels whose properties are known."""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import triton
import triton.language as tl
from aot import SHARED_MEMORY, compile_for
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime import interpreter

TARGETS = tuple(SHARED_MEMORY)


@triton.jit
def copy(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < size), at < size)


@triton.jit
def hold(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Needs every value of x twice, with a reduction over all of them between."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < size)
    tl.store(y_ptr + at, x * tl.sum(x), at < size)


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, SIDE: tl.constexpr):
    rows, columns = tl.arange(0, SIDE)[:, None] * SIDE, tl.arange(0, SIDE)[None, :]
    a, b = tl.load(a_ptr + rows + columns), tl.load(b_ptr + rows + columns)
    tl.store(c_ptr + rows + columns, tl.dot(a, b))


@gluon.jit
def fetch(x_desc, y_desc, z_ptr, BLOCK: gl.constexpr):
    """Bring a tile of x and one of y to shared memory by TMA, and add them."""
    x = gl.allocate_shared_memory(gl.float32, [BLOCK, BLOCK], x_desc.layout)
    y = gl.allocate_shared_memory(gl.float32, [BLOCK, BLOCK], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(ready, count=1)
    hopper.mbarrier.expect(ready, x_desc.block_type.nbytes + y_desc.block_type.nbytes)
    load(x_desc, [0, 0], ready, x)
    load(y_desc, [0, 0], ready, y)
    hopper.mbarrier.wait(ready, 0)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
    gl.store(z_ptr + rows * BLOCK + columns, x.load(layout) + y.load(layout))


@triton.jit
def wrong(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, tl.inline_asm_elementwise("gibberish $0, $1;", "=r,r", [x], tl.int32, True, 1))


tma = hopper.tma
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

COPY = {"x_ptr": "*bf16:16", "y_ptr": "*bf16:16", "size": "i32:16"}
MULTIPLY = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16", "c_ptr": "*fp32:16"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_compiled_and_disassembled(target):
    compiled = compile_for(target, copy, COPY, {"BLOCK": 1024})
    assert compiled.target == target
    assert f".target {target}" in compiled.ptx
    assert 0 < compiled.registers < 64
    assert compiled.count("EXIT")
    assert not compiled.warnings


def test_wide_accesses_need_alignment():
    wide = compile_for("sm_90", copy, COPY, {"BLOCK": 1024})
    narrow = compile_for("sm_90", copy, {**COPY, "x_ptr": "*bf16"}, {"BLOCK": 1024})
    assert (wide.wide_loads, wide.wide_stores) == (1, 1)
    assert (narrow.wide_loads, narrow.wide_stores) == (0, 1)


def test_spills_are_seen():
    types = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "size": "i32"}
    fits = compile_for("sm_90", hold, types, {"BLOCK": 1024}, num_warps=1)
    spilt = compile_for("sm_90", hold, types, {"BLOCK": 16384}, num_warps=1)
    assert fits.spills == fits.spilled_bytes == 0
    assert spilt.spills >= 2
    assert spilt.spilled_bytes > 0
    assert spilt.registers <= 255


@pytest.mark.parametrize(("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_matrix_instructions_are_counted(target, opcode):
    compiled = compile_for(target, multiply, MULTIPLY, {"SIDE": 64})
    assert compiled.count(opcode) > 0
    assert compiled.count(f"{opcode}.SP") == 0
    assert compiled.count(opcode[:-1]) == 0, "half an opcode is none"
    assert compiled.shared >= 2 * 64 * 64 * 2


def test_tma_destinations_are_the_tiles():
    layout = gl.NVMMASharedLayout(128, 32, 2)
    tile = f"tensordesc<fp32[32,32],{layout!r}>"
    types = {"x_desc": tile, "y_desc": tile, "z_ptr": "*fp32:16"}
    compiled = compile_for("sm_90", fetch, types, {"BLOCK": 32})
    assert sorted(compiled.tma_destinations) == [0, 32 * 32 * 4]


def test_a_kernel_is_compiled_once():
    first, again, other = (
        compile_for("sm_90", copy, COPY, {"BLOCK": block}) for block in (1024, 1024, 512)
    )
    assert again is first
    assert other is not first


def test_the_interpreter_may_have_run_before():
    """It leaves builtins of the language replaced, and the compiler would stumble over them."""
    interpreter._patch_lang(hold.fn)
    types = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "size": "i32"}
    assert compile_for("sm_80", hold, types, {"BLOCK": 128}).count("EXIT")


def test_forgotten_arguments_are_named():
    with pytest.raises(AssertionError, match="size"):
        compile_for("sm_90", copy, {"x_ptr": "*bf16", "y_ptr": "*bf16"}, {"BLOCK": 64})


def test_a_kernel_that_does_not_compile_raises(capsys):
    with pytest.raises(triton.runtime.errors.PTXASError, match="gibberish"):
        compile_for("sm_90", wrong, {"x_ptr": "*i32"})
    assert not capsys.readouterr().out, "Triton's copy of the program would fill the screen"
