"""Compare the sparse kernels with their references, once, on the device that will run them.

    compress   values and metadata, bit for bit, with a smooth vector too where there are codes
               |scale - reference| <= 2 (K + 12) 2^-24 scale
    multiply   |y - y64| <= 2^-8 |y64| + 2^-20 K max(|x| @ |w|ᵀ · columns)
               y64: the product in fp64, with the scales of rows and columns and a bias

The sizes leave a tail in every dimension and more tiles than one. A sum of K squares in any order
errs by at most K roundings; the correction is the root of the ratio of two of them, which halves
their errors, and twelve more roundings follow. The bound of a product is far from what a wrong word
of metadata or a wrong address gives: a misplaced value is an error of order |x| |w|.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    problem = _Problem.of(device, kind)
    for smooth in (None, problem.smooth) if QUANTIZED[kind] else (None,):
        compressed = problem.x, problem.factor, QUANTIZED[kind], "norm", smooth
        values, metadata, scale = nm_compress.launch(*compressed)
        expected = nm_compress_reference(*compressed)
        if not _same_bits(values, expected[0]):
            return "nm_compress returns wrong values"
        if not _same_bits(metadata, expected[1]):
            return "nm_compress returns wrong metadata"
        if not torch.allclose(scale, expected[2], rtol=2 * (CHANNELS + 12) * 2.0**-24, atol=0):
            return "nm_compress returns wrong scales"
    weight, columns, bias = problem.weight, problem.columns, problem.bias
    y = sparse_kernel(device).launch(values, metadata, weight, bias, scale, columns)
    dense = expand(values, metadata)[:TOKENS].double() * scale.double()[:, None]
    scaled = weight.double() * columns.double()[:, None]
    exact = dense @ scaled.T + bias.double()
    magnitude = (dense.abs() @ scaled.abs().T).max()
    bound = 2.0**-8 * exact.abs() + 2.0**-20 * CHANNELS * magnitude
    wrong = ~((y.double() - exact).abs() <= bound)
    return f"nm_matmul is wrong at {int(wrong.sum())} of {wrong.numel()}" if wrong.any() else None


def _same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@dataclass
class _Problem:
    """Activations, a weight of the kind's type, and all vectors that go with them."""

    x: torch.Tensor
    weight: torch.Tensor
    factor: torch.Tensor
    smooth: torch.Tensor
    columns: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, device: torch.device, kind: str) -> _Problem:
        """Draw them on the CPU, whatever the defaults of the process are."""
        generator = torch.Generator("cpu").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

        x, weight = normal(TOKENS, CHANNELS), normal(OUTPUTS, CHANNELS)
        factor, smooth = normal(CHANNELS).abs() + 0.5, normal(CHANNELS).abs() + 0.5
        columns, bias = normal(OUTPUTS).abs() + 0.5, 4 * normal(OUTPUTS)
        x = x.to(torch.float16 if kind == "fp16" else torch.bfloat16)
        if kind == "int8":
            weight, columns = (weight * 30).clamp(-127, 127).round(), columns / 30
        types = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
        weight = weight.to(types.get(kind, x.dtype))
        return cls(*(each.to(device) for each in (x, weight, factor, smooth, columns, bias)))
