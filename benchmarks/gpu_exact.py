"""Is a product right?  Blocks of it against fp64, before anything is timed.

    block = Block.of(inputs)
    block.error(variant, y)                                 of its budget; wrong above 1

A block is the first, a middle and the last tile of tokens, and as many runs of outputs. What is
selected there, and its codes, come from the reference on the CPU, so that a compression on the GPU
is judged too. The budget of an error is derived, not chosen: twice the error of an independent
product of the same operands in the same precision (dense cuBLAS for 16 bits, dense ``_scaled_mm``
for fp8, the rounding of the exact sum for int8) and the rounding of the result, in the Frobenius
norm over the block.

``poison`` leaves bytes of 0xFF (NaN in every float, an illegal word of metadata) in the memory that
the next tensors of those sizes get: what a kernel does not write is found out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from gpu_operands import CODES, LIMITS, Inputs, amber
from gpu_variants import DENSE, MULTIPLY, Variant, scaled_mm
from torch import Tensor

from amber_compile.kernels.two_four import TILE_ROWS, expand

RUN = 64  # outputs


def poison(device: torch.device, sizes: Iterable[int]) -> None:
    """Fill blocks of so many bytes with 0xFF and free them again."""
    blocks = [torch.empty(size, dtype=torch.uint8, device=device).fill_(255) for size in sizes]
    del blocks


def places(length: int, run: int) -> Tensor:
    """Return the indices of the first, a middle and the last run; each starts at a whole run."""
    last = max(0, (length - 1) // run)
    starts = sorted({0, last // 2, last})
    return torch.tensor([i for s in starts for i in range(s * run, min(length, (s + 1) * run))])


@dataclass
class Block:
    """A part of a product, exact."""

    inputs: Inputs
    rows: Tensor
    columns: Tensor
    _exact: dict[tuple[str, bool, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs) -> Block:
        """Choose the rows and columns."""
        rows = places(inputs.x.shape[0], TILE_ROWS)
        return cls(inputs, rows, places(inputs.weights.dense.shape[0], RUN))

    def error(self, variant: Variant, y: Tensor) -> float:
        """Return the error of ``y`` as a share of its budget; infinite if it is not finite."""
        if y.is_floating_point() and not bool(torch.isfinite(y).all()):
            return float("inf")
        exact, low = self.references(variant)
        actual = self._part(y).double()
        rounding = torch.finfo(y.dtype).eps / 2 if y.is_floating_point() else 0.0
        budget = 2 * (low.to(y.dtype).double() - exact).norm() + rounding * exact.norm()
        error = (actual - exact).norm()
        return 0.0 if error == 0 else float(error / budget)

    def references(self, variant: Variant) -> tuple[Tensor, Tensor]:
        """Return the block in fp64, and in the precision of ``variant``, fp32."""
        key = (variant.kind, variant.selected, variant.scaled)
        if key not in self._exact:
            self._exact[key] = self._references(*key)
        return self._exact[key]

    def compression_differs(self, kind: str, compressed: tuple[Tensor, Tensor, Tensor]) -> str:
        """Return what of a compressed activation is not the reference's, bit for bit, or ""."""
        values, metadata, scale = (part.cpu() for part in compressed)
        expected = self._reference_compressed(kind)
        tiles = torch.unique(self.rows // TILE_ROWS)
        parts = {"values": values[self.rows], "metadata": metadata[tiles]}
        if kind in LIMITS:
            parts["row_scale"] = scale[self.rows]
        wrong = [
            name
            for (name, part), wanted in zip(parts.items(), expected, strict=False)
            if not torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
        ]
        return ", ".join(wrong)

    @cached_property
    def _x(self) -> Tensor:
        return self.inputs.x[self.rows.to(self.inputs.x.device)].cpu()

    def _reference_compressed(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        quantize = kind if kind in LIMITS else None
        found: tuple[Tensor, Tensor, Tensor] = amber.nm_compress(
            self._x, self.inputs.weights.factor.cpu(), quantize, None
        )
        return found

    def _part(self, y: Tensor) -> Tensor:
        device = y.device
        return y[self.rows.to(device)][:, self.columns.to(device)].cpu()

    def _references(self, kind: str, selected: bool, scaled: bool) -> tuple[Tensor, Tensor]:
        """Multiply the operands of the block twice: in fp64, and as ``kind`` does."""
        x, row_scale = self._activation(kind, selected)
        weight, col_scale = self.inputs.weights.operand(kind)
        weight = weight[self.columns.to(weight.device)]
        exact = x.double() @ weight.double().cpu().T
        low = _low(x.to(weight.device), weight, exact).float().cpu()
        if not scaled or kind not in LIMITS:
            return exact, low
        assert col_scale is not None  # 8-bit weights have one
        columns = col_scale.cpu()[self.columns]
        scales = row_scale.double()[:, None] * columns.double()[None]
        return exact * scales, low * row_scale[:, None] * columns[None]

    def _activation(self, kind: str, selected: bool) -> tuple[Tensor, Tensor]:
        """Return the rows that are multiplied, dense, on the CPU, and their scales."""
        if selected:
            values, metadata, scale = self._reference_compressed(kind)
            return expand(values, metadata), scale
        if kind not in LIMITS:
            return self._x, torch.ones(len(self.rows))
        codes, scale = self.inputs.dense_int8 if kind == "int8" else self.inputs.dense_fp8
        rows = self.rows.to(codes.device)
        return codes[rows].cpu(), scale[rows].cpu()


def _low(x: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """Multiply in the precision of the operands, by another implementation than ours."""
    if weight.dtype == CODES["int8"]:
        return exact.bfloat16()
    if weight.dtype != CODES["fp8"]:
        return torch.mm(x, weight.t())
    rows, columns = x.shape[0], weight.shape[0]
    x, weight = _whole_tiles(x), _whole_tiles(weight)
    ones = [torch.ones(len(part), device=x.device) for part in (x, weight)]
    return scaled_mm(x, ones[0], weight, ones[1])[:rows, :columns]


def _whole_tiles(codes: Tensor) -> Tensor:
    """Add rows of zeros up to a multiple of 16: the dense fp8 product wants that."""
    missing = -codes.shape[0] % TILE_ROWS
    zeros = torch.zeros(missing, codes.shape[1], device=codes.device).to(codes.dtype)
    return torch.cat([codes.view(torch.uint8), zeros.view(torch.uint8)]).view(codes.dtype)


def check(variant: Variant, inputs: Inputs, block: Block) -> tuple[float, str]:
    """Run a variant into poisoned memory; return its error as a share of the budget, and why it is
    wrong, or "".
    """
    tokens, outputs = inputs.x.shape[0], inputs.weights.dense.shape[0]
    poison(inputs.x.device, (tokens * outputs * size for size in (2, 4)))
    error = block.error(variant, variant.run(inputs))
    exact = (variant.library, variant.kind, variant.stage) == (DENSE, "int8", MULTIPLY)
    if exact and error > 0:
        return error, "an int32 sum is wrong"
    return error, "" if error <= 1 else f"error {error:.2g} of its budget"
