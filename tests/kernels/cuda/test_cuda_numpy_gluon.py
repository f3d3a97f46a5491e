"""The NumPy runner of Gluon kernels: correct kernels run, and planted faults are found."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from instructions import IllegalMetadata
from numpy_gluon import NumpyKernel
from numpy_memory import DeadLock, Race
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from amber_compile.kernels.cuda.gluon import block_barrier, copy_async, copy_tile, tile_place

ROWS, WORDS = 8, 16
TILE = gl.NVMMASharedLayout(64, 32, 2)
VECTOR = gl.BlockedLayout([1], [32], [1], [0])
MATRIX = gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0])

# ---- a pipeline of TMA copies --------------------------------------------------------------------


@gluon.jit
def produce(x_tiles, tiles, full, empty, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        if FAULT == "producer waits for the wrong phase":
            mbarrier.wait(empty.index(stage), phase)
        elif FAULT != "producer does not wait":
            mbarrier.wait(empty.index(stage), phase ^ 1)
        SIZE: gl.constexpr = 512 if FAULT != "too few bytes are expected" else 256
        MORE: gl.constexpr = 0 if FAULT != "too many bytes are expected" else 4
        mbarrier.expect(full.index(stage), SIZE + MORE)
        copy_tile(x_tiles, [0, step * 16], full.index(stage), tiles.index(stage))


@gluon.jit
def consume(y_ptr, tiles, full, empty, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    rows = gl.arange(0, 8, gl.SliceLayout(1, MATRIX))
    words = gl.arange(0, 16, gl.SliceLayout(0, MATRIX))
    total = gl.zeros([8, 16], gl.int32, MATRIX)
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        if FAULT == "consumer waits for the wrong phase":
            mbarrier.wait(full.index(stage), phase ^ 1)
        elif FAULT != "consumer does not wait":
            mbarrier.wait(full.index(stage), phase)
        if FAULT == "consumer frees its stage too early":
            mbarrier.arrive(empty.index(stage))
        if FAULT == "consumer reads the next stage":
            total += tiles.index((step + 1) % STAGES).load(MATRIX)
        else:
            total += tiles.index(stage).load(MATRIX)
        if FAULT == "consumer frees its stage twice":
            mbarrier.arrive(empty.index(stage))
        if (
            FAULT != "consumer does not free its stage"
            and FAULT != "consumer frees its stage too early"
        ):
            mbarrier.arrive(empty.index(stage))
    gl.store(y_ptr + rows[:, None] * 16 + words[None, :], total)


@gluon.jit
def pipeline(x_tiles, y_ptr, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    tiles = gl.allocate_shared_memory(gl.int32, [STAGES, 8, 16], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    extra = 1 if FAULT == "producer copies too much" else 0
    gl.warp_specialize(
        [
            (consume, (y_ptr, tiles, full, empty, steps, STAGES, FAULT)),
            (produce, (x_tiles, tiles, full, empty, steps + extra, STAGES, FAULT)),
        ],
        [1],
        [24],
    )


FAULTS = {
    "producer waits for the wrong phase": (DeadLock, "every partition waits"),
    "producer does not wait": (Race, "overwritten"),
    "producer copies too much": (Race, "in flight"),
    "too few bytes are expected": (AssertionError, "512 bytes land where 256"),
    "too many bytes are expected": (DeadLock, "every partition waits"),
    "consumer waits for the wrong phase": (Race, "read"),
    "consumer does not wait": (Race, "read"),
    "consumer frees its stage too early": (Race, "may"),
    "consumer does not free its stage": (DeadLock, "every partition waits"),
    "consumer frees its stage twice": (AssertionError, "overwritten|waits"),
    "consumer reads the next stage": (Race, "read"),
}


def run_pipeline(fault=None, steps=7, stages=2, columns=None):
    x = torch.arange(ROWS * steps * WORDS, dtype=torch.int32).view(ROWS, steps * WORDS)
    x = x[:, : columns or x.shape[1]].contiguous()
    y = torch.full((ROWS, WORDS), -1, dtype=torch.int32)
    tiles = TensorDescriptor.from_tensor(x, [ROWS, WORDS], TILE)
    NumpyKernel(pipeline)[(1,)](tiles, y, steps, STAGES=stages, FAULT=fault)
    whole = torch.zeros(ROWS, steps * WORDS, dtype=torch.int32)
    whole[:, : x.shape[1]] = x
    return y, whole.view(ROWS, steps, WORDS).sum(1, dtype=torch.int32)


@pytest.mark.parametrize(("steps", "stages"), [(7, 2), (1, 3), (9, 1)])
def test_a_pipeline_runs(steps, stages):
    y, expected = run_pipeline(steps=steps, stages=stages)
    assert torch.equal(y, expected)


def test_a_tile_outside_of_the_matrix_is_zero():
    y, expected = run_pipeline(columns=5 * WORDS + 4)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_protocol_is_found(fault):
    error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        run_pipeline(fault)


# ---- cp.async ------------------------------------------------------------------------------------


@gluon.jit
def stream(x_ptr, y_ptr, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 4, [1, 0])
    PENDING: gl.constexpr = STAGES - 1 if FAULT == "one group too few" else STAGES - 2
    tiles = gl.allocate_shared_memory(gl.int32, [STAGES, 8, 16], LAYOUT)
    rows = gl.arange(0, 8, gl.SliceLayout(1, MATRIX))[:, None]
    words = gl.arange(0, 16, gl.SliceLayout(0, MATRIX))[None, :]
    x_ptrs = x_ptr + rows * (steps * 16) + words
    for step in gl.static_range(STAGES - 1):
        copy_async(tiles.index(step), x_ptrs + step * 16)
        async_copy.commit_group()
    total = gl.zeros([8, 16], gl.int32, MATRIX)
    for step in range(steps):
        async_copy.wait_group(PENDING)
        if FAULT != "no barrier":
            block_barrier()
        following = step + STAGES - 1
        if following < steps:
            stage = step % STAGES if FAULT == "a stage that is read" else following % STAGES
            copy_async(tiles.index(stage), x_ptrs + following * 16)
        async_copy.commit_group()
        total += tiles.index(step % STAGES).load(MATRIX)
    gl.store(y_ptr + rows * 16 + words, total)


def run_stream(fault=None, steps=6):
    x = torch.arange(ROWS * steps * WORDS, dtype=torch.int32).view(ROWS, -1)
    y = torch.empty(ROWS, WORDS, dtype=torch.int32)
    NumpyKernel(stream)[(1,)](x, y, steps, STAGES=3, FAULT=fault)
    return y, x.view(ROWS, steps, WORDS).sum(1, dtype=torch.int32)


def test_a_stream_of_copies_runs():
    y, expected = run_stream()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("fault", ["one group too few", "no barrier", "a stage that is read"])
def test_a_fault_in_a_stream_is_found(fault):
    with pytest.raises(Race, match=r"read|overwritten"):
        run_stream(fault)


# ---- accesses ------------------------------------------------------------------------------------


@gluon.jit
def copy(x_ptr, y_ptr, count, OFFSET: gl.constexpr, MASKED: gl.constexpr, TWICE: gl.constexpr):
    i = gl.program_id(0) * 32 + gl.arange(0, 32, VECTOR)
    live = i < count if MASKED else i < 1000
    x = gl.load(x_ptr + i + OFFSET, mask=live, other=0)
    gl.store(y_ptr + i // 2 if TWICE else y_ptr + i, x, mask=live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_a_copy(dtype):
    x = torch.randn(50).mul(100).to(dtype)
    y = torch.empty_like(x)
    NumpyKernel(copy)[(2,)](x, y, 50, OFFSET=0, MASKED=True, TWICE=False)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"MASKED": False}, IndexError, "element 50 of 50"),
        ({"OFFSET": -1}, IndexError, "element -1"),
        ({"OFFSET": 1}, IndexError, "element 50"),
        ({"TWICE": True}, AssertionError, "stored twice"),
    ],
)
def test_a_wrong_access_is_found(changed, error, message):
    x = torch.randn(50)
    with pytest.raises(error, match=message):
        NumpyKernel(copy)[(2,)](
            x, x.clone(), 50, **{"OFFSET": 0, "MASKED": True, "TWICE": False} | changed
        )


@gluon.jit
def large_offset(y_ptr, stride):
    i = gl.arange(0, 32, VECTOR)
    gl.store(y_ptr + i * stride, i, mask=i < 1)


def test_an_int32_that_overflows_is_found():
    with pytest.raises(OverflowError, match="int32"):
        NumpyKernel(large_offset)[(1,)](torch.zeros(32), 1 << 30)


@gluon.jit
def places(y_ptr, rows, columns, GROUP: gl.constexpr):
    tile = gl.program_id(0)
    row, column = tile_place(tile, rows, columns, GROUP)
    i = gl.arange(0, 32, VECTOR)
    gl.store(y_ptr + tile * 2 + i, gl.where(i == 0, row, column), mask=i < 2)


@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 3, 2), (1, 4, 8), (8, 2, 8), (7, 1, 3)])
def test_every_tile_has_its_place(rows, columns, group):
    y = torch.empty(rows * columns, 2, dtype=torch.int32)
    NumpyKernel(places)[(rows * columns,)](y, rows, columns, GROUP=group)
    walked = [tuple(place) for place in y.tolist()]
    assert sorted(walked) == [(r, c) for r in range(rows) for c in range(columns)]
    assert walked[: min(rows, group)] == [(r, 0) for r in range(min(rows, group))]


# ---- inline assembly -----------------------------------------------------------------------------

HEAD = "{ .reg .b32 a, b; .reg .b64 da, db; mov.u32 a, global_smem; "
A_AT, B_AT = 0x80000020, 0x40000040  # 64 and 128 bytes wide, swizzled
DESCRIPTORS = (
    f"shr.u32 b, a, 4; add.u32 b, b, 256; mov.b64 da, {{a, {A_AT}}}; mov.b64 db, {{b, {B_AT}}}; "
)
FENCE, COMMIT, WAIT = (
    f"wgmma.{name}; "
    for name in ("fence.sync.aligned", "commit_group.sync.aligned", "wait_group.sync.aligned 0")
)
MULTIPLY = "wgmma.mma_async.sp.sync.aligned.m64n8k64.s32.s8.s8 {$0,$1,$2,$3}, da, db, $8, 0, 1; "
GOOD = HEAD + DESCRIPTORS + FENCE + MULTIPLY + COMMIT + WAIT + "}"


@gluon.jit
def multiply(y_ptr, ASM: gl.constexpr, METADATA: gl.constexpr, ROWS_A: gl.constexpr):
    ACC: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    a = gl.allocate_shared_memory(gl.int32, [ROWS_A, 16], gl.NVMMASharedLayout(64, 32, 2))
    b = gl.allocate_shared_memory(gl.int32, [8, 32], gl.NVMMASharedLayout(128, 32, 2))
    a.store(gl.full([ROWS_A, 16], 0x01010101, gl.int32, ACC))
    b.store(gl.full([8, 32], 0x02020202, gl.int32, ACC))
    acc = gl.zeros([128, 4], gl.int32, ACC)
    metadata = gl.full([128, 4], METADATA, gl.int32, ACC)
    CONSTRAINTS: gl.constexpr = "=r,=r,=r,=r,0,1,2,3,r,r,r,r"
    acc = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [acc, metadata], gl.int32, False, 4)
    thread = gl.arange(0, 128, gl.SliceLayout(1, ACC))[:, None]
    gl.store(y_ptr + thread * 4 + gl.arange(0, 4, gl.SliceLayout(0, ACC))[None, :], acc)


def run_multiply(asm, metadata=0x44444444, rows=64):
    y = torch.empty(128, 4, dtype=torch.int32)
    NumpyKernel(multiply)[(1,)](y, ASM=asm, METADATA=metadata, ROWS_A=rows)
    return y


def test_inline_assembly_runs():
    assert (run_multiply(GOOD) == 32 * 1 * 2).all()


def test_an_operand_outside_of_its_tile_is_found():
    with pytest.raises(AssertionError, match="nothing wrote it"):
        run_multiply(GOOD, rows=16)


@pytest.mark.parametrize(
    ("asm", "error", "message"),
    [
        (GOOD.replace(FENCE, ""), AssertionError, "without wgmma.fence"),
        (GOOD.replace(WAIT, ""), AssertionError, "not waited for"),
        (GOOD.replace(COMMIT, ""), AssertionError, "not waited for"),
        (GOOD.replace(str(A_AT), str(A_AT + 1)), AssertionError, "swizzle pattern"),
        (GOOD.replace("m64n8k64", "m64n8k32"), AssertionError, "k32"),
        (GOOD.replace("m64n8", "m64n16"), AssertionError, "accumulators"),
        (GOOD.replace("0, 1; ", "0, 1, 1, 1; "), AssertionError, "ends with"),
        (GOOD.replace("add.u32 b, b", "add.u32 c, b"), AssertionError, "not declared"),
        (GOOD.replace("shr.u32 b, a", "shr.u32 b, b"), AssertionError, "before it is written"),
        (GOOD.replace("shr.u32", "bfe.u32"), NotImplementedError, "bfe"),
    ],
)
def test_a_fault_in_inline_assembly_is_found(asm, error, message):
    with pytest.raises(error, match=message):
        run_multiply(asm)


def test_illegal_metadata_is_found():
    with pytest.raises(IllegalMetadata):
        run_multiply(GOOD, metadata=0)


@gluon.jit
def arrive_twice(y_ptr, COUNT: gl.constexpr):
    barrier = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    if COUNT > 0:
        mbarrier.init(barrier.index(0), count=COUNT)
    mbarrier.arrive(barrier.index(0), count=2)


@pytest.mark.parametrize(("count", "message"), [(1, "too often"), (0, "initialised")])
def test_a_wrong_arrival_is_found(count, message):
    with pytest.raises(AssertionError, match=message):
        NumpyKernel(arrive_twice)[(1,)](torch.zeros(1), COUNT=count)
