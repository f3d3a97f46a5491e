"""Ten thousand random launches: what goes wrong once in a thousand goes wrong here.

Each launch has sizes, data and an epilogue from a seed of its own; a failure names the seed. The
reference is computed on the GPU in fp64, and the device is waited for once in a hundred launches,
so that launches overlap as they do in a model.

The bound is the worst case of a sum: K times the unit roundoff of an addition times the sum of the
magnitudes. An addition rounds to 24 bits, on a tensor core towards zero; fp8 products are summed 32
at a time, aligned to the largest, with 13 bits behind its point.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from gpu_problems import EPILOGUE, FP32_ROUNDING, KINDS, OPERANDS, QUANTIZED, amber
from torch import Tensor

from amber_compile.kernels.two_four import expand

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

LAUNCHES = 10_000
TOGETHER = 100
TOKENS = (1, 2, 15, 16, 17, 31, 48, 63, 64, 65, 100, 127, 128, 129, 191, 257)
OUTPUTS = (8, 16, 40, 64, 72, 128, 136, 256, 264)
CHANNELS = (64, 128, 192, 256, 320, 448, 512, 576)
ROUNDING = {"bf16": 2.0**-23, "fp16": 2.0**-23, "int8": 0.0, "fp8": 2.0**-13 / 32}


def launch(seed: int, kind: str, device: torch.device) -> Tensor:
    """Compress and multiply random operands; return the worst error as a share of its bound."""
    draw = random.Random(seed)
    tokens, outputs, channels = draw.choice(TOKENS), draw.choice(OUTPUTS), draw.choice(CHANNELS)
    correction = draw.choice((None, "norm"))
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    x = torch.randn(tokens, channels, device=device, generator=generator).to(dtype)
    factor = torch.rand(channels, device=device, generator=generator) + 0.5
    weight = torch.randn(outputs, channels, device=device, generator=generator)
    weight = (40 * weight).clamp(-127, 127) if kind == "int8" else weight
    weight = weight.to(OPERANDS[kind])
    values, metadata, scale = amber.nm_compress(x, factor, QUANTIZED.get(kind), correction)
    rows = scale if len(scale) else None
    columns = (
        torch.rand(outputs, device=device, generator=generator) if draw.random() < 0.5 else None
    )
    y = amber.nm_matmul(values, metadata, weight, None, rows, columns)
    return share_of_bound(kind, y, expand(values, metadata), weight, rows, columns)


def share_of_bound(
    kind: str, y: Tensor, dense: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None
) -> Tensor:
    """Return the largest error of ``y``, as a share of what the worst case allows; NaN is worst."""
    dense, weight = dense.double(), weight.double()
    exact, magnitude = dense @ weight.T, dense.abs() @ weight.abs().T
    for scale in (None if rows is None else rows[:, None], columns):
        if scale is not None:
            exact, magnitude = exact * scale.double(), magnitude * scale.double().abs()
    rounding = torch.finfo(y.dtype).eps / 2 + EPILOGUE * FP32_ROUNDING
    bound = dense.shape[1] * ROUNDING[kind] * magnitude + rounding * exact.abs()
    bound += torch.finfo(y.dtype).tiny
    return ((y.double() - exact).abs() / bound).nan_to_num(nan=float("inf")).max()


def batches(count: int) -> Iterator[range]:
    """Yield the seeds of the launches that are waited for together."""
    for start in range(0, count, TOGETHER):
        yield range(start, min(count, start + TOGETHER))


@pytest.mark.parametrize("kind", KINDS)
def test_random_launches(device, kind):
    for seeds in batches(LAUNCHES // len(KINDS)):
        shares = torch.stack([launch(seed, kind, device) for seed in seeds]).tolist()
        wrong = {seed: share for seed, share in zip(seeds, shares, strict=True) if share > 1}
        assert not wrong, f"{kind}: seeds and errors as shares of their bounds: {wrong}"
