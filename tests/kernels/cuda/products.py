"""Products of 2:4 sparse activations for tests, and what amber::nm_matmul defines them to be."""

import torch

from amber_compile.kernels.two_four import compress, expand, pack_metadata

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def problem(kind, tokens, outputs, channels, seed=0):
    """Return (values, metadata, weight); any two channels of a group may be the kept ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    weight = torch.randn(outputs, channels, generator=generator)
    if kind == "int8":
        x, weight = (x * 40).round().clamp(-127, 127), (weight * 40).round().clamp(-128, 127)
    keys = torch.rand(tokens, channels // 4, 4, generator=generator)
    kept = keys >= keys.sort(-1).values[..., 2:3]
    values, nibbles = compress(x.to(KINDS[kind]), kept.flatten(1))
    metadata = pack_metadata(nibbles, 8 if kind == "int8" else 16)
    return values, metadata, weight.to(KINDS[kind])


def scales(tokens, outputs, bias=torch.float32):
    """Return (bias, row_scale, col_scale)."""
    generator = torch.Generator().manual_seed(1)
    row, column = (torch.rand(n, generator=generator) + 0.5 for n in (tokens, outputs))
    return torch.randn(outputs, generator=generator).to(bias), row, column


def definition(precision, values, metadata, weight, bias=None, row_scale=None, col_scale=None):
    """Return nm_matmul before it is rounded, its sums and all that follows in ``precision``."""
    integer = values.dtype == torch.int8
    x, w = (t.to(torch.int64 if integer else precision) for t in (expand(values, metadata), weight))
    y = (x @ w.T).to(precision)
    y = y if row_scale is None else y * row_scale.to(precision)[:, None]
    y = y if col_scale is None else y * col_scale.to(precision)
    return y if bias is None else y + bias.to(precision)


def assert_computes(y, dtype, *operands):
    """Assert that ``y`` is what nm_matmul defines: for int8 to the bit."""
    assert y.dtype == dtype
    low, exact = (definition(precision, *operands) for precision in (torch.float32, torch.float64))
    if operands[0].dtype == torch.int8:
        torch.testing.assert_close(y, low.to(dtype), rtol=0, atol=0)
        return
    budget = 2 * (low - exact).abs().max() + torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= budget).all()
