"""What the kernels of nm_compress compile to: no spills, few registers, accesses of 16 bytes."""

import itertools

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
from aot import compile_for

from amber_compile.kernels.cuda import nm_compress as kernels

QUANTIZED = (None, "int8", "fp8")
POINTERS = {
    "x_ptr": "*i64:16",
    "factor_ptr": "*fp32:16",
    "smooth_ptr": "*fp32:16",
    "metadata_ptr": "*i32:16",
    "row_scale_ptr": "*fp32:16",
}


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *tensors, **options):
        self.tensors, self.options = tensors, options


@pytest.fixture
def compiled(monkeypatch):
    """Compile for ``target`` what ``launch`` would run for rows of that many channels."""

    def compile_launch(
        target, channels, quantize, correction, weighted, dtype=torch.bfloat16, smoothed=False
    ):
        name = "_compress_quantized" if quantize else "_compress"
        kernel, recorder = getattr(kernels, name), Recorder()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, recorder)
            factor = torch.ones(channels) if weighted else None
            x, smooth = torch.zeros(16, channels, dtype=dtype), factor if smoothed else None
            kernels.launch(x, factor, quantize, correction, smooth)
        options = recorder.options
        if "CONVERT" in options:
            options["CONVERT"] = target != "sm_80"
        types = {**POINTERS, "values_ptr": "*i16:16" if quantize else "*i32:16"}
        types = {name: types[name] for name in kernel.arg_names if name in types}
        for argument, tensor in zip(kernel.arg_names, recorder.tensors, strict=False):
            if tensor is None:
                types.pop(argument)
                options[argument] = None
        types.update(tokens="i32", x_stride="i32:16")
        constants = {key: value for key, value in options.items() if key in kernel.arg_names}
        constants = {key: value for key, value in constants.items() if key not in types}
        launched = {key: options[key] for key in ("num_warps", "enable_fp_fusion")}
        return compile_for(target, kernel, types, constants, **launched), options

    return compile_launch


CASES = [
    *itertools.product(("sm_80", "sm_90"), (4096,), QUANTIZED, (None, "norm"), (False, True)),
    *itertools.product(("sm_90",), (14336,), QUANTIZED, (None, "norm"), (True,)),
]


@pytest.mark.parametrize(("target", "channels", "quantize", "correction", "weighted"), CASES)
def test_resources(compiled, target, channels, quantize, correction, weighted):
    kernel, options = compiled(target, channels, quantize, correction, weighted)
    assert kernel.spills == kernel.spilled_bytes == 0
    assert kernel.registers <= 128
    assert not kernel.warnings
    assert kernel.wide_loads == kernel.count("LDG"), "every load is of 16 bytes"
    if options.get("ROWS") != 1:  # one row of codes is 8 bytes a thread
        assert kernel.wide_stores >= 2


@pytest.mark.parametrize(
    ("target", "channels", "quantize"),
    [("sm_80", 4096, "fp8"), ("sm_90", 4096, "int8"), ("sm_90", 14336, "fp8")],
)
def test_smoothing_takes_no_more_than_registers(compiled, target, channels, quantize):
    kernel, _ = compiled(target, channels, quantize, "norm", True, smoothed=True)
    assert kernel.spills == kernel.spilled_bytes == 0
    assert kernel.registers <= 128
    assert kernel.wide_loads == kernel.count("LDG")


@pytest.mark.parametrize("channels", [64, 8192, 28672])
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_other_sizes_do_not_spill(compiled, channels, quantize):
    smoothed = quantize is not None
    kernel, _ = compiled("sm_89", channels, quantize, "norm", True, torch.float16, smoothed)
    assert kernel.spills == kernel.spilled_bytes == 0


def test_e4m3_is_converted_by_the_hardware(compiled):
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled("sm_90", 4096, "fp8", None, False)[0].ptx
    assert "e4m3x2" not in compiled("sm_80", 4096, "fp8", None, False)[0].ptx


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_codes_are_rounded_twice_like_the_reference(compiled, quantize):
    """Nothing is contracted: x · (1 / scale) is rounded before it is rounded to a code."""
    kernel, _ = compiled("sm_80", 4096, quantize, None, False)
    fused = [line for line in kernel.ptx.splitlines() if "fma.rn.f32" in line]
    assert not fused, fused[:3]
