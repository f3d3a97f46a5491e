"""What the Triton selection becomes for GPUs that are not here: no spills, accesses of 16 bytes."""

import pytest
import torch
from aot import compile_for

from amber_compile.kernels.cuda import nm_select

TARGETS = ["sm_80", "sm_89", "sm_90"]
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BF16, FP16, FP32 = TYPES

# Instructions a channel on sm_90, all of them counted. At 3.35 TB/s an H100 moves 3.6 bf16 channels
# a clock and multiprocessor in and out, which leaves 35 instructions to each (128 are issued).
FAST = [
    (BF16, 2, 4, False, 15),
    (BF16, 2, 4, True, 16),
    (BF16, 4, 8, False, 16),
    (BF16, 4, 8, True, 25),
    (BF16, 8, 16, False, 18),
    (BF16, 8, 16, True, 27),
    (FP32, 2, 4, True, 17),
]


def compiled(target, dtype, n, m, weighted=False, correction=None, experts=None, prefix=False):
    """Compile what ``launch`` would run for tokens of 4096 channels."""
    kernel, arguments, options = nm_select.choose(4096, dtype, n, m, correction, experts)
    addresses = {"x_ptr": f"*{TYPES[dtype]}:16", "y_ptr": f"*{TYPES[dtype]}:16"}
    sizes = {"channels": "i32:16", "x_stride": "i64:16"}
    absent = {}
    if correction is None:
        sizes["tokens"] = "i32"
    for name, kind, present in (
        ("factor_ptr", "*fp32:16", weighted or experts),
        ("ends_ptr", "*i32:16", experts),
        ("experts", "i32", experts),
        ("sequence", "i32", prefix),
        ("dense", "i32", prefix),
    ):
        if present:
            sizes[name] = kind
        else:
            absent[name] = None
    return compile_for(target, kernel, {**addresses, **sizes}, {**absent, **arguments}, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "n", "m", "weighted", "budget"), FAST)
def test_fast_patterns(target, dtype, n, m, weighted, budget):
    code = compiled(target, dtype, n, m, weighted)
    pieces = nm_select.CHANNELS_A_THREAD * dtype.itemsize // 16
    assert not code.spills
    assert not code.spilled_bytes
    assert not code.warnings
    assert not code.shared  # nothing passes from thread to thread
    assert code.wide_stores == pieces
    assert code.wide_loads >= pieces
    assert code.count("LDG") == code.wide_loads
    assert code.registers <= 128
    if target == "sm_90":
        instructions = sum(code.opcodes.values()) - code.count("NOP")
        assert instructions / nm_select.CHANNELS_A_THREAD <= budget


@pytest.mark.parametrize(
    ("dtype", "n", "m", "correction", "experts", "prefix"),
    [
        (FP16, 1, 2, None, None, True),
        (BF16, 17, 32, None, 9, True),
        (FP32, 16, 32, None, 1, False),
        (BF16, 2, 4, "norm", None, True),
        (BF16, 8, 16, "norm", 256, False),
        (FP32, 16, 32, "variance", 8, True),
    ],
)
def test_the_rest_does_not_spill(dtype, n, m, correction, experts, prefix):
    code = compiled("sm_90", dtype, n, m, True, correction, experts, prefix)
    assert not code.spills
    assert not code.spilled_bytes
    assert not code.warnings
    assert code.wide_loads
    assert code.wide_stores


@pytest.mark.parametrize("target", TARGETS)
def test_denormals_are_not_flushed(target):
    assert "mul.f32" in compiled(target, BF16, 2, 4, True).ptx
    assert ".ftz" not in compiled(target, BF16, 2, 4, True).ptx
    assert ".ftz" not in compiled(target, FP32, 2, 4, True, "norm").ptx
