"""Compare the sparse kernels with their references, once, on the device that will run them.

    compress   values and metadata, bit for bit; the scales within rounding
    multiply   |y - y64| <= 2^-8 |y64| + 2^-20 K max(|x| @ |w|ᵀ)      y64: the product in fp64

The sizes leave a tail in every dimension and more tiles than one. The bound is far from what a
wrong word of metadata or a wrong address gives: a misplaced value is an error of order |x| |w|.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from amber_compile.kernels.cuda import nm_compress
from amber_compile.kernels.nm_compress import nm_compress_reference
from amber_compile.kernels.nm_matmul import sparse_kernel
from amber_compile.kernels.two_four import expand

TOKENS, OUTPUTS, CHANNELS = 203, 264, 448
QUANTIZED = {"bf16": None, "fp16": None, "int8": "int8", "fp8": "fp8"}


def why_wrong(device: torch.device, kind: str) -> str | None:
    """Return what the kernels get wrong for operands of ``kind`` on ``device``, or None."""
    with unset_fake_temporarily(), torch.no_grad(), torch.cuda.device(device):
        try:
            return _difference(device, kind)
        except Exception as failure:  # a compiler's, a driver's: whatever it is, do not use it
            return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]


def _difference(device: torch.device, kind: str) -> str | None:
    x, weight, factor = _problem(device, kind)
    values, metadata, scale = nm_compress.launch(x, factor, QUANTIZED[kind], "norm")
    expected = nm_compress_reference(x, factor, QUANTIZED[kind], "norm")
    if not _same_bits(values, expected[0]):
        return "nm_compress returns wrong values"
    if not _same_bits(metadata, expected[1]):
        return "nm_compress returns wrong metadata"
    if not torch.allclose(scale, expected[2], rtol=1e-5, atol=0):
        return "nm_compress returns wrong scales"
    y = sparse_kernel(device).launch(values, metadata, weight, None, scale)
    dense = expand(values, metadata)[:TOKENS].double() * scale.double()[:, None]
    exact = dense @ weight.double().T
    magnitude = (dense.abs() @ weight.double().abs().T).max()
    bound = 2.0**-8 * exact.abs() + 2.0**-20 * CHANNELS * magnitude
    wrong = ~((y.double() - exact).abs() <= bound)
    return f"nm_matmul is wrong at {int(wrong.sum())} of {wrong.numel()}" if wrong.any() else None


def _same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def _problem(device: torch.device, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return activations, a weight of the kind's type, and a factor."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:  # whatever the defaults of the process are
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    x, weight = normal(TOKENS, CHANNELS), normal(OUTPUTS, CHANNELS)
    factor = normal(CHANNELS).abs() + 0.5
    x = x.to(torch.float16 if kind == "fp16" else torch.bfloat16)
    if kind == "int8":
        weight = (weight * 30).clamp(-127, 127).round()
    types = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    return x.to(device), weight.to(types.get(kind, x.dtype)).to(device), factor.to(device)
