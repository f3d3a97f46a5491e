"""What follows from a weight that was released: from what is kept of it, not from its values.

    codes, scales of all rows     those of the gate's and of the up half's rows, and the reverse
    scales of other outputs       those without, times the factor
    tensors of the plan           as ever

All of it is exact: each row of a weight is quantised by itself. A score's factor, or codes of
another format or smooth vector, do not follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .derivations import Calibrated, Derivation, Quantized, WeightCodes, WeightScale
from .kernels.prepared_weight import prepare_weight, unprepare

Kept = Mapping[Derivation, torch.Tensor]
Pieces = Sequence[tuple[Quantized, torch.Tensor]]
"""Rows of codes or of scales, each with what they are of."""


def needs_values(derivation: Derivation) -> bool:
    """Whether ``derivation`` reads the values of its weight."""
    if isinstance(derivation, WeightCodes | WeightScale):
        return derivation.quantized.source is None
    return not isinstance(derivation, Calibrated)


def is_codes(derivation: Derivation) -> bool:
    """Whether ``derivation`` is the codes of a weight's own values."""
    return isinstance(derivation, WeightCodes) and needs_values(derivation)


def rebuilt(weight: torch.Tensor, wanted: Derivation, kept: Kept) -> torch.Tensor | None:
    """Return what ``wanted`` makes of the released ``weight``; None if that needs its values."""
    if not needs_values(wanted):
        return wanted.compute(weight)
    if isinstance(wanted, WeightCodes):
        codes = _rows(weight, wanted.quantized, codes_of(weight, kept))
        return None if codes is None else prepare_weight(codes)
    if isinstance(wanted, WeightScale):
        scale = _rows(weight, wanted.quantized, scales_of(kept))
        return None if scale is None else wanted.applied(scale, weight)
    return None


def whole(weight: torch.Tensor, kept: Kept) -> tuple[Quantized, torch.Tensor, torch.Tensor] | None:
    """Return codes [N, K] and scales [N] of all rows, and how they were made; None if not kept."""
    for quantized, _ in codes_of(weight, kept):
        every = replace(quantized, matrix=replace(quantized.matrix, start=0, stop=None))
        codes = _rows(weight, every, codes_of(weight, kept))
        scales = _rows(weight, every, scales_of(kept))
        if codes is not None and scales is not None:
            return every, codes, scales
    return None


def codes_of(weight: torch.Tensor, kept: Kept) -> Pieces:
    """Return the codes that are kept of the weight's own values, unpacked."""
    return [
        (one.quantized, unprepare(prepared, *one.quantized.matrix.of(weight).shape))
        for one, prepared in kept.items()
        if isinstance(one, WeightCodes) and is_codes(one)
    ]


def scales_of(kept: Kept) -> Pieces:
    """Return the scales that are kept of the weight's own values, without other factors."""
    return [
        (one.quantized, scale)
        for one, scale in kept.items()
        if isinstance(one, WeightScale) and needs_values(one) and not one.outputs
    ]


def _rows(weight: torch.Tensor, wanted: Quantized, pieces: Pieces) -> torch.Tensor | None:
    """Return the rows that ``wanted`` is of, put together from pieces; None if some are missing."""
    total = wanted.matrix.of(weight).shape[-2] + wanted.matrix.start
    found, at = [], wanted.matrix.start
    for piece, rows in sorted(pieces, key=lambda one: one[0].matrix.start):
        first = piece.matrix.start
        if replace(wanted, matrix=piece.matrix) != piece:
            continue
        if piece.matrix.transposed == wanted.matrix.transposed and first <= at < first + len(rows):
            found.append(rows[at - first : total - first])
            at = min(first + len(rows), total)
    if at < total:
        return None
    return found[0] if len(found) == 1 else torch.cat(found)
