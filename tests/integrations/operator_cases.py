"""Calls of the operators that a program rewritten for a CPU makes: good ones and bad ones."""

from collections.abc import Iterator
from typing import Any

import torch

from amber_compile.kernels.prepared_weight import prepare_weight

Call = tuple[str, tuple[Any, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32, BF16, FP16 = DTYPES


def good_calls() -> list[Call]:
    """Return calls of all operators, with inputs of many kinds."""
    torch.manual_seed(0)
    return [*_selections(), *_quantisations(), *_products()]


def _selections() -> Iterator[Call]:
    for dtype in DTYPES:
        for n, m in ((2, 4), (1, 2), (4, 8), (8, 16), (16, 32), (4, 4)):
            for correction in (None, "norm", "variance"):
                x, factor = torch.randn(2, 5, 96).to(dtype), torch.rand(96)
                yield "nm_select", (x, None, n, m, correction)
                yield "nm_select", (x, factor, n, m, correction, 2)
        yield "nm_select", (torch.randn(2, 3, 8).to(dtype), None, 2, 4, None, 0, 7)  # too few
        yield "nm_select", (torch.randn(2, 3, 8).to(dtype), None, 2, 4, None, 0, 6)
        yield "nm_select", (torch.randn(8).to(dtype), None, 2, 4, "norm", 1)
        yield "nm_select", (torch.randn(0, 8).to(dtype), None, 2, 4)
        yield "nm_select", (torch.randn(300, 512).to(dtype), torch.rand(512), 2, 4)  # threads
        for x in _views(dtype):
            yield "nm_select", (x, torch.rand(2 * x.shape[-1])[::2], 2, 4, "norm")
    x, factor = torch.randn(6, 16), torch.rand(3, 16)
    yield "nm_select", (x, factor, 2, 4, None, 0, 0, torch.tensor([2, 2, 5], dtype=torch.int32))
    yield "nm_select", (_special(FP32), None, 2, 4, "norm")
    yield "nm_select", (_special(BF16), None, 2, 4, "variance")


def _quantisations() -> Iterator[Call]:
    for dtype in DTYPES:
        x, smooth = torch.randn(2, 5, 96).to(dtype), torch.rand(96) + 0.5
        for n, m in ((2, 4), (4, 8), (4, 4)):
            for correction in (None, "norm", "variance"):
                yield "nm_quantize", (x, torch.rand(96), None, n, m, "int8", correction)
                yield "nm_quantize", (x, None, smooth, n, m, "int8", correction, 2, 4)
        yield "nm_quantize", (x, None, None, 2, 4, "int8", "norm", 0, 11)  # too few
        yield "nm_quantize", (torch.randn(0, 8).to(dtype), None, None, 2, 4)
        yield "quantize_rows", (x, None)
        yield "quantize_rows", (x, smooth, "int8")
        yield "quantize_rows", (torch.randn(300, 512).to(dtype), None)
        for view in _views(dtype):
            yield "nm_quantize", (view, None, None, 2, 4)
            yield "quantize_rows", (view, None)
        yield "quantize_rows", (_special(dtype), None)


def _products() -> Iterator[Call]:
    for dtype in DTYPES:
        for rows, outputs, channels in (((1,), 7, 5), ((2, 9), 75, 203), ((70,), 130, 256)):
            for bias in (None, torch.randn(outputs), torch.randn(outputs).bfloat16()):
                yield "quantized_linear", (*_product(rows, outputs, channels), bias, dtype)
    codes, *rest = _product((9,), 33, 64)
    turned = codes.T.contiguous().T
    yield "quantized_linear", (turned, *rest, torch.randn(66).double()[::2], FP32)
    yield "quantized_linear", (*_product((0,), 33, 64), None, BF16)


def _product(rows: tuple[int, ...], outputs: int, channels: int) -> tuple[torch.Tensor, ...]:
    """Return codes, row_scale, weight and weight_scale of a product."""
    codes = torch.randint(-127, 128, (*rows, channels), dtype=torch.int8)
    weight = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8)
    return codes, torch.rand(rows), prepare_weight(weight), torch.rand(outputs)


def _views(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return activations that are not contiguous: rows apart, channels apart, turned."""
    x = torch.randn(6, 5, 64).to(dtype)
    return [x[::2], x[..., :32], x[..., ::2], x.transpose(0, 1), x.transpose(1, 2)[..., :4]]


def _special(dtype: torch.dtype) -> torch.Tensor:
    """Return rows with NaN, infinities, zeros, denormals and ties."""
    tiny, huge = torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max
    rows = (
        [torch.nan, 1, torch.inf, -2, 0, -0.0, 0, -0.0],
        [tiny, -tiny, huge, -huge, 1, 1, -1, 1],
        [0.0] * 8,
        [torch.inf, -torch.inf, torch.inf, 3, 2, 2, 2, 2],
    )
    return torch.tensor(rows).to(dtype)


def bad_calls() -> list[tuple[Call, str]]:
    """Return calls that the library refuses, each with what it says."""
    x = torch.randn(3, 8)
    codes, scale, weight, weight_scale = _product((3,), 7, 8)
    unpacked = torch.zeros(7, 8, dtype=torch.int8)
    return [
        (("nm_select", (x.double(), None, 2, 4)), "x has dtype torch.float64; valid in this"),
        (("nm_select", (x, None, 5, 4)), "pattern=5:4 is not an N:M pattern"),
        (("nm_select", (x[:, :6], None, 2, 4)), "x has 6 channels; valid: a multiple of m=4"),
        (("nm_select", (x[0, 0], None, 2, 4)), "x is a scalar"),
        (("nm_select", (x, torch.rand(4), 2, 4)), r"factor has shape \[4\]; valid: \[8\]"),
        (("nm_select", (x, torch.rand(8).bfloat16(), 2, 4)), "factor has dtype torch.bfloat16"),
        (("nm_select", (x, None, 2, 4, "mean")), "unknown correction 'mean'; valid: norm, varia"),
        (("nm_select", (x, None, 2, 4, None, -1)), "dense_prefix=-1 is negative"),
        (("nm_select", (x, None, 2, 4, None, 0, -1)), "min_tokens=-1 is negative"),
        (("nm_select", (x, None, 2, 4, None, 0, 0, torch.ones(1).int())), "offsets tell the rows"),
        (("nm_quantize", (x, None, None, 2, 4, "fp8")), "dtype 'fp8' has no codes in this librar"),
        (("quantize_rows", (x, torch.rand(4))), r"smooth has shape \[4\]; valid: \[8\]"),
        (("quantize_rows", (torch.randn(3, 0), None)), "x has 0 channels"),
        (("quantize_rows", (x.int(), None)), "x has dtype torch.int32"),
        (
            ("quantized_linear", (codes, scale, unpacked, weight_scale, None, BF16)),
            r"weight \[7, 8\] is not packed; valid: \[1, 2176\]",
        ),
        (
            ("quantized_linear", (codes, scale, weight, weight_scale, None, torch.float64)),
            "dtype=torch.float64; valid: torch.float32, torch.bfloat16, torch.float16",
        ),
        (
            ("quantized_linear", (codes, scale[:2], weight, weight_scale, None, BF16)),
            r"row_scale has shape \[2\]; valid: \[3\]",
        ),
        (
            ("quantized_linear", (codes, scale, weight, weight_scale, weight_scale.int(), BF16)),
            "bias has dtype torch.int32",
        ),
        (
            ("quantized_linear", (codes.float(), scale, weight, weight_scale, None, BF16)),
            r"codes are torch.float32 \[3, 8\]; valid in this library: torch.int8",
        ),
    ]
