"""Random problems for the kernels on a GPU, their exact answers, and what error is allowed.

    problem = Problem.random(seed, "int8", tokens=77, outputs=264, channels=448, device=device)
    assert problem.why_wrong(product) is None

An answer may differ from the product in fp64 by twice the error of an independent product of the
same operands in the same precision, dense and by PyTorch, both at their worst element, and by the
roundings of the epilogue: three operations in fp32 and the one to the type of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amber_compile.kernels.two_four import expand

amber = torch.ops.amber
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn
OPERANDS = {"bf16": BF16, "fp16": FP16, "int8": INT8, "fp8": FP8}
KINDS = tuple(OPERANDS)
QUANTIZED = {"int8": "int8", "fp8": "fp8"}
FP32_ROUNDING = 2.0**-24
EPILOGUE = 3
"""Roundings of the epilogue in fp32: two scales and a bias."""


def random_codes(size: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    """Draw what a kernel of ``kind`` multiplies: normal values, or all codes that int8 has."""
    if kind == "int8":
        return torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
    return torch.randn(size, generator=generator).to(OPERANDS[kind])


@dataclass
class Problem:
    """Operands of amber::nm_matmul."""

    kind: str
    values: Tensor
    metadata: Tensor
    weight: Tensor
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    out_dtype: torch.dtype | None = None

    @classmethod
    def random(
        cls,
        seed: int,
        kind: str,
        tokens: int,
        outputs: int,
        channels: int,
        device: torch.device,
        epilogue: str = "",
        out_dtype: torch.dtype | None = None,
    ) -> Problem:
        """Draw operands; ``epilogue`` has any of the words row, col, bias and bias32.

        The compressed form comes from the reference on the CPU, so that the products are judged
        alone.
        """
        generator = torch.Generator().manual_seed(seed)
        dtype = FP16 if kind == "fp16" else BF16
        x = torch.randn(tokens, channels, generator=generator).to(dtype)
        values, metadata, _ = amber.nm_compress(x, None, QUANTIZED.get(kind), None)
        weight = random_codes((outputs, channels), kind, generator)
        words = epilogue.split()
        scales = [torch.rand(size, generator=generator) + 0.5 for size in (tokens, outputs)]
        bias = torch.randn(outputs, generator=generator)
        result = out_dtype or (OPERANDS[kind] if kind in ("bf16", "fp16") else BF16)
        if kind == "int8":
            scales = [scale / 127 for scale in scales]
        parts = [
            values,
            metadata,
            weight,
            bias if "bias32" in words else bias.to(result) if "bias" in words else None,
            scales[0] if "row" in words or kind == "int8" else None,
            scales[1] if "col" in words or kind == "int8" else None,
        ]
        moved = [None if part is None else part.to(device) for part in parts]
        return cls(kind, *moved, out_dtype=out_dtype)  # type: ignore[arg-type]  # never None there

    def operands(self) -> tuple[object, ...]:
        """Return the arguments of the operator and of every ``launch``."""
        return (
            *(self.values, self.metadata, self.weight),
            *(self.bias, self.row_scale, self.col_scale, self.out_dtype),
        )

    def solve(self) -> Tensor:
        """Call the operator."""
        y: Tensor = amber.nm_matmul(*self.operands())
        return y

    def exact(self) -> Tensor:
        """Return the product in fp64."""
        return self._finish(self._dense().double() @ self.weight.double().T)

    def allowed(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the error that is allowed of each element of a result of ``dtype``."""
        low = self._finish(low_precision_product(self._dense(), self.weight)).double()
        bias = 0.0 if self.bias is None else self.bias.double().abs()
        roundings = EPILOGUE * FP32_ROUNDING * (exact.abs() + 2 * bias)
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        worst = (low - exact).abs().amax() if exact.numel() else 0.0
        return 2 * worst + roundings + rounding

    def why_wrong(self, y: Tensor) -> str | None:
        """Return where and how far ``y`` is off, or None."""
        exact = self.exact()
        if y.shape != exact.shape:
            return f"shape {list(y.shape)} instead of {list(exact.shape)}"
        error = (y.double() - exact).abs()
        wrong = ~(error <= self.allowed(exact, y.dtype))  # a NaN is wrong
        if not bool(wrong.any()):
            return None
        first = wrong.nonzero()[0].tolist()
        return (
            f"{int(wrong.sum())} of {wrong.numel()} wrong, the first at {first}: "
            f"{y[tuple(first)].item()} instead of {exact[tuple(first)].item()}"
        )

    def _dense(self) -> Tensor:
        dense: Tensor = expand(self.values, self.metadata)
        return dense

    def _finish(self, product: Tensor) -> Tensor:
        """Scale and shift in the precision of ``product``, in the operator's order."""
        if self.row_scale is not None:
            product = product * self.row_scale.to(product.dtype)[:, None]
        if self.col_scale is not None:
            product = product * self.col_scale.to(product.dtype)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def low_precision_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weightᵀ in fp32, as PyTorch multiplies dense operands of that type."""
    if x.dtype == INT8:
        return (x.double() @ weight.double().T).float()  # the sum is exact, its rounding is not
    if x.dtype != FP8:
        if x.device.type == "cuda":
            return torch.mm(x, weight.T, out_dtype=FP32)
        return x.float() @ weight.float().T
    tokens, outputs = x.shape[0], weight.shape[0]
    x, weight = whole_tiles(x), whole_tiles(weight)
    one = torch.ones((), device=x.device)
    whole = torch._scaled_mm(x, weight.T, one, one, out_dtype=FP32, use_fast_accum=True)
    return whole[:tokens, :outputs]


def whole_tiles(codes: Tensor) -> Tensor:
    """Add rows of zeros up to a multiple of 16, which the dense fp8 product wants."""
    zeros = torch.zeros(-codes.shape[0] % 16, codes.shape[1], device=codes.device).to(codes.dtype)
    return torch.cat([codes.view(torch.uint8), zeros.view(torch.uint8)]).view(codes.dtype)
