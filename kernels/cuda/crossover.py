"""From how many tokens on a sparse product is used instead of a dense one.

A static table, so that one call answers like the next. It needs no Triton, so that a report can be
made where there is none.
"""

from __future__ import annotations

WIDE, NARROW = ("bf16", "fp16"), ("int8", "fp8")

NEVER = 1 << 62
CROSSOVERS = (  # kinds, outputs from, channels from, tokens from; the first that applies
    (NARROW, 2048, 2048, 512),
    (WIDE, 8192, 2048, 1024),
    (WIDE, 4096, 4096, 2048),
)
"""Estimated from rooflines of an H100 that count the pass that compresses, not measured: bf16 gains
5 to 40 % at these sizes if the kernel reaches two thirds of its peak, 8 bit 40 % and more."""


def crossover(kind: str, outputs: int, channels: int) -> int:
    """Return the least number of tokens for which a sparse product is used instead of a dense one.

    With few outputs the pass that compresses costs more than the product saves: ``NEVER``.
    """
    for kinds, least_outputs, least_channels, tokens in CROSSOVERS:
        if kind in kinds and outputs >= least_outputs and channels >= least_channels:
            return tokens
    return NEVER
