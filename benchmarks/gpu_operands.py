"""What the GPU benchmarks multiply: linear shapes of two models, and sets of random operands.

    weights = Weights.random(shape, device, generator)      one set; several of them rotate
    inputs = Inputs.random(weights, tokens, generator)

Everything that is derived from a set (codes, selections, compressed forms) is made when it is first
asked for and kept, so that what a variant does not time is not in its time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from amber_compile.kernels.two_four import expand

amber = torch.ops.amber

INT8, FP8 = torch.int8, torch.float8_e4m3fn
LIMITS = {"int8": 127.0, "fp8": 448.0}
CODES = {"int8": INT8, "fp8": FP8}
KINDS = ("bf16", "int8", "fp8")
TINY = 2.0**-126


@dataclass(frozen=True)
class Shape:
    """A linear layer: ``channels`` (K) in, ``outputs`` (N) out."""

    model: str
    channels: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.channels}→{self.outputs}"


SHAPES = (
    Shape("Llama-3.1-8B", 4096, 14336),
    Shape("Llama-3.1-8B", 14336, 4096),
    Shape("Qwen2-7B", 3584, 18944),
    Shape("Qwen2-7B", 18944, 3584),
    Shape("Llama-3.1-8B", 4096, 4096),
    Shape("Qwen2-7B", 3584, 3584),
)
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS_OF_SQUARES = (512, 2048, 8192)
DECISIVE = (2048, 8192, 4096, 512, 1024, 16384, 256, 128)
"""The order in which token counts are measured, in case the time runs out."""


def points() -> list[tuple[Shape, int]]:
    """Return every (shape, token count) that is measured, the most decisive first."""
    return [
        (shape, tokens)
        for tokens in DECISIVE
        for shape in SHAPES
        if shape.channels != shape.outputs or tokens in TOKENS_OF_SQUARES
    ]


def quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes of each row of a dense ``x`` and the scales, fp32 [rows]."""
    limit = LIMITS[kind]
    scale = (x.abs().amax(-1, keepdim=True).float() / limit).clamp(min=TINY)
    codes = (x.float() * (1 / scale)).clamp(-limit, limit)
    return (codes.round() if kind == "int8" else codes).to(CODES[kind]), scale[:, 0]


@dataclass
class Weights:
    """One weight [N, K], in every form that is multiplied by, and the factor of the selection."""

    dense: Tensor
    factor: Tensor

    @classmethod
    def random(
        cls,
        shape: Shape,
        device: torch.device,
        generator: torch.Generator,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Weights:
        """Draw a weight with unit gain."""
        size = (shape.outputs, shape.channels)
        weight = torch.randn(size, device=device, generator=generator, dtype=dtype)
        factor = torch.rand(shape.channels, device=device, generator=generator) + 0.5
        return cls(weight * shape.channels**-0.5, factor)

    @cached_property
    def transposed(self) -> Tensor:
        """The weight as [K, N]: cuBLAS has other kernels for it."""
        return self.dense.t().contiguous()

    @cached_property
    def int8(self) -> tuple[Tensor, Tensor]:
        """Codes and scales of the rows."""
        return quantize_rows(self.dense, "int8")

    @cached_property
    def fp8(self) -> tuple[Tensor, Tensor]:
        """Codes and scales of the rows."""
        return quantize_rows(self.dense, "fp8")

    def operand(self, kind: str) -> tuple[Tensor, Tensor | None]:
        """Return what a kernel of ``kind`` multiplies by, and the scale of each output."""
        if kind not in LIMITS:
            return self.dense, None
        codes, scale = self.int8 if kind == "int8" else self.fp8
        return codes, scale


@dataclass
class Inputs:
    """One activation [T, K], in every form that is multiplied, and the weight it meets."""

    x: Tensor
    weights: Weights
    _kept: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def random(cls, weights: Weights, tokens: int, generator: torch.Generator) -> Inputs:
        """Draw activations."""
        like, size = weights.dense, (tokens, weights.dense.shape[1])
        x = torch.randn(size, device=like.device, generator=generator, dtype=like.dtype)
        return cls(x, weights)

    def operations(self) -> int:
        """Return the operations of the dense product."""
        return 2 * len(self.x) * self.weights.dense.numel()

    @cached_property
    def selected(self) -> Tensor:
        """``x`` with two of every four channels kept."""
        kept: Tensor = amber.nm_select(self.x, self.weights.factor, 2, 4)
        return kept

    @cached_property
    def dense_int8(self) -> tuple[Tensor, Tensor]:
        """Codes and scales of the tokens, all channels kept."""
        return quantize_rows(self.x, "int8")

    @cached_property
    def dense_fp8(self) -> tuple[Tensor, Tensor]:
        """Codes and scales of the tokens, all channels kept."""
        return quantize_rows(self.x, "fp8")

    def selected_dense(self, kind: str) -> Tensor:
        """Return what is kept, or its 8-bit codes, with zeros elsewhere."""
        if kind not in LIMITS:
            return self.selected
        values, metadata, _ = self.compressed(kind)
        return self._keep(("dense", kind), lambda: expand(values, metadata))

    def compressed(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, metadata and the scale of each token (empty for 16 bits)."""
        return self._keep(("compressed", kind), lambda: self.compress(kind))

    def cslt_compressed(self, kind: str) -> Tensor:
        """Return what is kept as cuSPARSELt stores it."""
        dense = self.selected_dense(kind)
        return self._keep(("cuSPARSELt", kind), lambda: torch._cslt_compress(dense))

    def _keep(self, key: tuple[str, str], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def compress(self, kind: str, correction: str | None = None) -> Any:
        """Select and compress ``x``: one launch of ours."""
        quantize = kind if kind in LIMITS else None
        return amber.nm_compress(self.x, self.weights.factor, quantize, correction)

    def multiply(self, kind: str, compressed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Multiply a compressed activation by the weight of its kind: one launch of ours."""
        values, metadata, row_scale = compressed
        weight, col_scale = self.weights.operand(kind)
        rows = row_scale if kind in LIMITS else None
        y: Tensor = amber.nm_matmul(values, metadata, weight, None, rows, col_scale)
        return y
