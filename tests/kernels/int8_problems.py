"""Codes, scales and weights for the tests of products of int8 codes."""

import torch

from amber_compile.kernels.prepared_weight import prepare_weight

RESULTS = [torch.bfloat16, torch.float16, torch.float32]


def codes_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def problem(tokens, channels, outputs, bias=True):
    """Return codes, row_scale, weight codes, weight_scale and bias, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    row, column = (torch.rand(size, generator=generator) - 0.3 for size in (tokens, outputs))
    add = torch.randn(outputs, generator=generator) * 9 if bias else None
    return codes_of(tokens, channels), row, codes_of(outputs, channels, seed=2), column, add


def prepared(codes, row_scale, weight, weight_scale, bias):
    return codes, row_scale, prepare_weight(weight), weight_scale, bias
