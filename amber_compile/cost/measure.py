"""Measure what the machine at hand achieves, in a few seconds.

    dense       matmul of two square matrices, in every dtype that the machine multiplies; of int8
                on a CPU the product with its scales (``quantized_linear``)
    bandwidth   copy of a tensor larger than any cache, read and written bytes together
    select      bytes/s of 2:4 selection by ``nm_select``, magnitude score, as a share of that
    overhead    time of one of many additions of a single number

Each is the best of several rounds, after one that warms up. The 2:4 matmul of a sparse unit is not
measured, nor are eight bits on a GPU: where the package knows the machine, a dense rate times the
gain expected there is taken, and ``source`` says so; else there is none, and
``dataclasses.replace`` can set one.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from amber_compile.kernels import nm_select, quantize_rows, quantized_linear
from amber_compile.kernels.int8_kernel import int8_kernel
from amber_compile.kernels.prepared_weight import prepare_weight

from .rates import WIDE, Rates, rates_of_device

SECONDS = 0.4
"""How long one quantity is measured."""
CALLS_IN_ROW = 200
"""Additions of a number in one round: launches overlap with execution, as in a model."""
ROUNDS = 3
"""The least number of rounds, however long they take."""


@torch.inference_mode()
def measure_rates(device: torch.device | str = "cpu") -> Rates:
    """Return the rates of a device, measured now with the threads that PyTorch has now."""
    device = torch.device(device)
    large = device.type != "cpu"
    dense = {
        dtype: _matmul_rate(dtype, device, 8192 if large else 1024) for dtype in _dtypes(device)
    }
    bandwidth = _bandwidth(device, 1 << (30 if large else 27))
    codes, sparse, expected = _expected(dense, device)
    if not large and int8_kernel() != "reference":
        codes = {"int8": _code_rate(1024)}
    threads = "" if large else f", {torch.get_num_threads()} threads"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Rates(
        name=_name(device),
        source=f"measured {today} with torch {torch.__version__}{threads}{expected}",
        dense=dense | codes,
        sparse=sparse,
        bandwidth=bandwidth,
        overhead=_overhead(device),
        select=_selection_bandwidth(device, 1 << (14 if large else 11)) / bandwidth,
    )


def _dtypes(device: torch.device) -> list[str]:
    """Return the dtypes to measure: no CPU here multiplies float16 well enough to wait for it."""
    return [dtype for dtype in WIDE if device.type != "cpu" or dtype != "float16"]


def _matmul_rate(dtype: str, device: torch.device, size: int) -> float:
    """Return FLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: torch.nn.functional.linear(a, b), device)


def _code_rate(size: int) -> float:
    """Return operations/s of a product of int8 codes on the CPU."""
    codes, scale = quantize_rows(torch.randn(size, size), None)
    weight = prepare_weight(codes)
    seconds = _best_seconds(
        lambda: quantized_linear(codes, scale, weight, scale, None, torch.bfloat16),
        torch.device("cpu"),
    )
    return 2 * size**3 / seconds


def _bandwidth(device: torch.device, size: int) -> float:
    """Return bytes/s of a copy of ``size`` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _selection_bandwidth(device: torch.device, tokens: int) -> float:
    """Return bytes/s of selecting 2:4 from ``[tokens, 4096]`` in bfloat16."""
    x = torch.randn(tokens, 4096, device=device).bfloat16()
    return 2 * x.nbytes / _best_seconds(lambda: nm_select(x, None, 2, 4), device)


def _overhead(device: torch.device) -> float:
    one = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(CALLS_IN_ROW):
            one.add_(1)

    return _best_seconds(many, device) / CALLS_IN_ROW


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of ``call`` in the rounds that fit into :data:`SECONDS`."""
    call()
    best, rounds, end = float("inf"), 0, time.perf_counter() + SECONDS
    while rounds < ROUNDS or time.perf_counter() < end:
        _wait_for(device)
        start = time.perf_counter()
        call()
        _wait_for(device)
        best, rounds = min(best, time.perf_counter() - start), rounds + 1
    return best


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _expected(
    dense: dict[str, float], device: torch.device
) -> tuple[dict[str, float], dict[str, float], str]:
    """Return rates in eight bits and of 2:4, as the package expects here, and words for that."""
    known = rates_of_device(device)
    if known is None:
        return {}, {}, ""
    gain = dense["bfloat16"] / known.dense["bfloat16"]
    codes = {dtype: gain * rate for dtype, rate in known.dense.items() if dtype not in dense}
    sparse = {
        dtype: (dense | codes)[dtype] / known.dense[dtype] * rate
        for dtype, rate in known.sparse.items()
    }
    words = f"; 8 bits and 2:4 matmul not measured, but expected from that ({known.source})"
    return codes, sparse, words


def _name(device: torch.device) -> str:
    """Return what the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (models[0] if models else platform.processor()) or platform.machine() or device.type
