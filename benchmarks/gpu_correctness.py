"""Are the kernels right on this device?  A few shapes with tails everywhere, one kind at a time.

    compress            values and metadata (and scales, quantised) bit for bit the reference's
    all products        within the budget of ``gpu_exact``, into poisoned memory

A few seconds, most of them compilation: it finds the gross mistakes before anything is timed. The
tests marked ``gpu`` are the thorough ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_exact import Block, check, poison
from gpu_operands import LIMITS, Inputs, Shape, Weights
from gpu_variants import AMBER, Variant, variants
from timing import reason
from tqdm import tqdm

KINDS = ("bf16", "fp16", "int8", "fp8")
SIZES = ((1, 8, 64), (77, 264, 448), (300, 520, 1088), (2048, 4096, 4096))
"""Tokens, outputs and channels."""


def correctness(device: torch.device, kind: str) -> Iterator[dict[str, object]]:
    """Yield one row per check; ``wrong`` is "" where all is well."""
    yield {"kind": kind, "check": "self-test", "wrong": "", "offered": offered(device, kind)}
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    for tokens, outputs, channels in tqdm(SIZES, desc=f"correctness {kind}", leave=False):
        generator = torch.Generator(device).manual_seed(tokens)
        weights = Weights.random(Shape("", channels, outputs), device, generator, dtype)
        inputs = Inputs.random(weights, tokens, generator)
        block = Block.of(inputs)
        size = f"{tokens}x{channels}→{outputs}"
        yield {"kind": kind, "check": f"compress {size}"} | _compression(inputs, block, kind)
        for variant in _variants(device, kind):
            yield {"kind": kind, "check": f"{variant.name} {size}"} | _product(
                variant, inputs, block
            )


def offered(device: torch.device, kind: str) -> str:
    """Return whether this device multiplies sparse operands of a kind, or why not."""
    from amber_compile.kernels.cuda.device import why_no_sparse_product

    return why_no_sparse_product(device, kind) or "yes"


def _variants(device: torch.device, kind: str) -> list[Variant]:
    like = "bf16" if kind == "fp16" else kind
    ours = [v for v in variants(device) if (v.library, v.kind) == (AMBER, like)]
    return [replace(v, kind=kind) for v in ours]


def _compression(inputs: Inputs, block: Block, kind: str) -> dict[str, object]:
    size = inputs.x.nbytes
    poison(inputs.x.device, [size, size // 2, size // 4, size // 16])
    try:
        quantize = kind if kind in LIMITS else "bf16"
        return {"wrong": block.compression_differs(kind, inputs.compress(quantize))}
    except Exception as error:
        return {"wrong": reason(error)}


def _product(variant: Variant, inputs: Inputs, block: Block) -> dict[str, object]:
    try:
        error, wrong = check(variant, inputs, block)
    except Exception as failure:
        return {"wrong": reason(failure)}
    return {"wrong": wrong, "error_of_budget": error}
