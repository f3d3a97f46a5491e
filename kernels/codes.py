"""Eight bits a value: symmetric codes, and one scale for each row.

    scale = max(amax / limit, 2^-126)       amax = max |v| of the row, limit 127 (int8), 448 (fp8)

    int8    code = rint(v · (1 / scale)), at most ±127
    fp8     code = e4m3(v · (1 / scale)), at most ±448

in fp32, every operation rounded to nearest even. A row with a NaN or an infinity has scale NaN and
codes 0, so that its product with anything is NaN, as it would be of the row itself. A row of zeros
has the least scale; in a row of that scale int8 codes of values up to half of it, 2^-127, are 0.
"""

from __future__ import annotations

import math

import torch

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LIMITS = {"int8": 127.0, "fp8": 448.0}
SMALLEST_SCALE = 2.0**-126
"""The smallest normal number: its reciprocal is finite, and a row of zeros needs no exception."""


def quantized(values: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [..., channels] of type ``CODES[dtype]`` and scale [...] of ``values``."""
    values, limit = values.float(), LIMITS[dtype]
    amax = values.abs().amax(-1, keepdim=True)
    # divided by a tensor: on a GPU a division by a number is a multiplication by its reciprocal
    scale = (amax / torch.full_like(amax, limit)).clamp(min=SMALLEST_SCALE)
    finite = amax.isfinite()
    codes = (values * scale.reciprocal()).clamp(-limit, limit).where(finite, 0)
    codes = codes.round() if dtype == "int8" else codes
    return codes.to(CODES[dtype]), scale.where(finite, math.nan).squeeze(-1)
