"""What the kernel of nm_quantize compiles to: no spills, few registers, accesses of 16 bytes."""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
from aot import compile_for

from amber_compile.kernels.cuda.nm_quantize import choose, nm_quantize_kernel

TYPES = {torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16", torch.float32: "*fp32:16"}
REGISTERS = 65536  # of a multiprocessor


def compiled(
    target, channels, dtype, pattern, codes, correction=None, weighted=True, smoothed=True
):
    """Compile for ``target`` what ``launch`` would run for rows of that many channels."""
    constants, options = choose(channels, dtype, *pattern, correction, None)
    absent = ("ends_ptr", "sequence", "dense", "experts")
    absent += () if weighted else ("factor_ptr",)
    absent += () if smoothed else ("smooth_ptr",)
    types = {
        "x_ptr": TYPES[dtype],
        "factor_ptr": "*fp32:16",
        "smooth_ptr": "*fp32:16",
        "codes_ptr": "*i8:16",
        "row_scale_ptr": "*fp32:16",
        "channels": "i32:16",
        "x_stride": "i32:16",
    }
    types = {name: kind for name, kind in types.items() if name not in absent}
    constants |= dict.fromkeys(absent)
    constants |= {"FP8": codes == "fp8", "CONVERT": target != "sm_80"}
    return compile_for(target, nm_quantize_kernel, types, constants, **options), options


@pytest.mark.parametrize(
    ("target", "channels", "dtype", "pattern", "codes", "correction"),
    [
        ("sm_90", 4096, torch.bfloat16, (2, 4), "int8", "norm"),
        ("sm_80", 4096, torch.bfloat16, (2, 4), "fp8", "norm"),
        ("sm_90", 14336, torch.bfloat16, (2, 4), "fp8", None),
        ("sm_89", 14336, torch.float16, (8, 16), "int8", "variance"),
        ("sm_90", 8192, torch.bfloat16, (16, 32), "int8", "norm"),
        ("sm_80", 14336, torch.float32, (2, 4), "int8", "norm"),
    ],
)
def test_resources(target, channels, dtype, pattern, codes, correction):
    kernel, options = compiled(target, channels, dtype, pattern, codes, correction)
    assert kernel.spills == kernel.spilled_bytes == 0
    assert kernel.registers * 32 * options["num_warps"] <= REGISTERS
    assert not kernel.warnings
    assert kernel.wide_loads == kernel.count("LDG"), "every load is of 16 bytes"
    assert kernel.wide_stores >= 1


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_quantising_alone(target):
    """No selection: codes of a token that fits into one block are made from registers."""
    kernel, _ = compiled(target, 4096, torch.bfloat16, (1, 1), "int8", None, False, False)
    assert kernel.spills == kernel.spilled_bytes == 0
    assert kernel.registers <= 64
    assert (kernel.wide_loads, kernel.count("LDG")) == (2, 2)  # 16 channels a thread, once
    assert kernel.wide_stores == 1


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_codes_are_rounded_twice_like_the_reference(codes):
    """Nothing is contracted: x · smooth and v · (1 / scale) are rounded each."""
    kernel, _ = compiled("sm_80", 4096, torch.bfloat16, (2, 4), codes)
    fused = [line for line in kernel.ptx.splitlines() if "fma.rn.f32" in line]
    assert not fused, fused[:3]
