"""Measure what the machine at hand achieves, in a few seconds.

    dense       matmul of two square matrices, in every dtype that the machine multiplies
    bandwidth   copy of a tensor larger than any cache, read and written bytes together
    select      bytes/s of 2:4 selection by ``nm_select``, magnitude score, as a share of that
    overhead    time of one of many additions of a single number

Each is the best of several rounds, after one that warms up. The 2:4 matmul of a sparse unit is not
measured: where the package knows the machine, its dense rate times the 2:4 gain expected there is
taken, and ``source`` says so; else there is none, and ``dataclasses.replace`` can set one.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from amber_compile.kernels import nm_select

from .rates import SIZES, Rates, rates_of_device

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
    sparse, expected = _expected_sparse(dense, device)
    threads = "" if large else f", {torch.get_num_threads()} threads"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Rates(
        name=_name(device),
        source=f"measured {today} with torch {torch.__version__}{threads}{expected}",
        dense=dense,
        sparse=sparse,
        bandwidth=bandwidth,
        overhead=_overhead(device),
        select=_selection_bandwidth(device, 1 << (14 if large else 11)) / bandwidth,
    )


def _dtypes(device: torch.device) -> list[str]:
    """Return the dtypes to measure: no CPU here multiplies float16 well enough to wait for it."""
    return [dtype for dtype in SIZES if device.type != "cpu" or dtype != "float16"]


def _matmul_rate(dtype: str, device: torch.device, size: int) -> float:
    """Return FLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: torch.nn.functional.linear(a, b), device)


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


def _expected_sparse(dense: dict[str, float], device: torch.device) -> tuple[dict[str, float], str]:
    """Return 2:4 rates by what the package expects of this machine, and words for the source."""
    known = rates_of_device(device)
    if known is None:
        return {}, ""
    gains = {dtype: rate / known.dense[dtype] for dtype, rate in known.sparse.items()}
    sparse = {dtype: dense[dtype] * gain for dtype, gain in gains.items()}
    return sparse, f"; 2:4 matmul not measured, but expected from that ({known.source})"


def _name(device: torch.device) -> str:
    """Return what the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (models[0] if models else platform.processor()) or platform.machine() or device.type
