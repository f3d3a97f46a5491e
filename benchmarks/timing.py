"""How long does a GPU take?  Replays of CUDA graphs, in turns, over inputs too many for its cache.

    times = in_turns(CudaClock(), {"dense": [call, call, ...], "sparse": [...]}, rounds=7)

Each entry is a list of calls that do the same on inputs of their own, so that one pass over the
list reads more than the cache holds (``copies``). The calls are recorded in one CUDA graph, as
often as it takes to fill ``CudaClock.batch_seconds``; a replay costs the host nothing between two
kernels. What cannot be recorded runs eagerly between two events, and its ``Time`` says so.

In each round every entry has one turn, the first one a different one each round, so that what the
clocks of the device do meets all alike. A time is the median over the rounds, with its quartiles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the median, and the quartiles, over rounds."""

    median: float
    low: float
    high: float
    how: str

    @property
    def spread(self) -> float:
        """How far the quartiles lie apart, as a share of the median."""
        return (self.high - self.low) / self.median


class Batch(Protocol):
    """Many calls that are timed as one."""

    calls: int
    how: str

    def run(self) -> float:
        """Do all the calls and return how many seconds they took together."""
        ...


class Clock(Protocol):
    """Makes batches of calls."""

    def batch(self, calls: Sequence[Call]) -> Batch: ...


def copies(set_bytes: int, cache_bytes: int) -> int:
    """Return how many sets of inputs are three times what the cache holds."""
    return max(1, math.ceil(3 * cache_bytes / max(1, set_bytes)))


def in_turns(
    clock: Clock, entries: Mapping[str, Sequence[Call]], rounds: int = 7
) -> dict[str, Time | str]:
    """Return the time of one call of each entry, or what went wrong with it."""
    batches, failed = _batches(clock, entries)
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    names = list(batches)
    for turn in range(rounds + 1):  # the first one warms up
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            taken = batches[name].run() / batches[name].calls
            if turn:
                seconds[name].append(taken)
    return failed | {name: summary(seconds[name], batches[name].how) for name in names}


def _batches(
    clock: Clock, entries: Mapping[str, Sequence[Call]]
) -> tuple[dict[str, Batch], dict[str, Time | str]]:
    batches: dict[str, Batch] = {}
    failed: dict[str, Time | str] = {}
    for name, calls in entries.items():
        try:
            batches[name] = clock.batch(calls)
        except Exception as error:
            failed[name] = reason(error)
    return batches, failed


def summary(seconds: Sequence[float], how: str) -> Time:
    """Return median and quartiles of some times."""
    if len(seconds) == 1:
        return Time(seconds[0], seconds[0], seconds[0], how)
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return Time(median(seconds), low, high, how)


def reason(error: BaseException) -> str:
    """Return an error as one line of a report."""
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


# ---- clocks --------------------------------------------------------------------------------------


@dataclass
class _Timed:
    """A batch on a GPU: ``go`` starts it, two events measure it."""

    go: Call
    calls: int
    how: str

    def run(self) -> float:
        return _elapsed(self.go)


def _elapsed(go: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    go()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@dataclass
class CudaClock:
    """Times calls on the current CUDA device."""

    batch_seconds: float = 0.004
    least_calls: int = 6

    def batch(self, calls: Sequence[Call]) -> Batch:
        """Warm the calls up, then record them; one that cannot be recorded runs eagerly."""

        def once() -> None:
            for call in calls:
                call()

        once()
        once()
        torch.cuda.synchronize()
        each = _elapsed(once) / len(calls)  # with what the host costs, so rather too long
        wanted = max(self.least_calls, min(400, self.batch_seconds / each))
        passes = math.ceil(wanted / len(calls))
        count = passes * len(calls)
        try:
            return _Timed(_recorded(once, passes), count, "graph")
        except RuntimeError:
            torch.cuda.synchronize()
            return _Timed(lambda: [once() for _ in range(passes)], count, "events")


def _recorded(once: Call, passes: int) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            once()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


@dataclass
class _Host:
    do: Sequence[Call]
    calls: int
    how: str = "host"

    def run(self) -> float:
        started = time.perf_counter()
        for call in self.do:
            call()
        return time.perf_counter() - started


class HostClock:
    """Times calls on the CPU, each batch being one pass over the calls."""

    def batch(self, calls: Sequence[Call]) -> Batch:
        """Warm the calls up once."""
        for call in calls:
            call()
        return _Host(calls, len(calls))
