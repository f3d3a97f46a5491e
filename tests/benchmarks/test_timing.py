"""Timing in turns, on a clock that only pretends."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from timing import Batch, Call, CudaClock, Time, copies, in_turns, summary


@dataclasses.dataclass
class FakeBatch:
    """A batch whose rounds take what a list says."""

    calls: int
    seconds: list[float]
    order: list[int]
    how: str = "fake"

    def run(self) -> float:
        self.order.append(self.calls)
        return self.seconds.pop(0)


class FakeClock:
    """Hands out batches that were prepared; a call that raises cannot be timed."""

    def __init__(self, *batches: FakeBatch) -> None:
        self.batches = list(batches)

    def batch(self, calls: Sequence[Call]) -> Batch:
        for call in calls:
            call()
        return self.batches.pop(0)


def test_entries_take_turns_and_the_first_round_does_not_count():
    order: list[int] = []
    clock = FakeClock(
        FakeBatch(2, [100.0, 2.0, 4.0, 6.0], order), FakeBatch(3, [100.0, 3.0, 3.0, 3.0], order)
    )
    times = in_turns(clock, {"a": [int], "b": [int]}, rounds=3)
    assert times == {"a": Time(2.0, 1.5, 2.5, "fake"), "b": Time(1.0, 1.0, 1.0, "fake")}
    assert order == [2, 3, 3, 2, 2, 3, 3, 2]
    assert times["a"].spread == 0.5


def test_what_cannot_be_timed_has_its_reason_and_the_rest_goes_on():
    def broken() -> None:
        raise RuntimeError("no such kernel\n")

    clock = FakeClock(FakeBatch(1, [1.0, 1.0], []))
    times = in_turns(clock, {"broken": [broken], "whole": [int]}, rounds=1)
    assert times == {
        "broken": "RuntimeError: no such kernel",
        "whole": summary([1.0], "fake"),
    }


def test_sets_of_inputs_are_three_times_the_cache():
    assert copies(10, 100) == 30
    assert copies(200, 100) == 2
    assert copies(10**9, 100) == 1


class FakeDevice:
    """Stands in for ``torch.cuda``: a call takes a millisecond, and graphs replay what they saw."""

    def __init__(self, records: bool) -> None:
        self.records, self.now, self.seen, self.recording = records, 0.0, 0, False

    def call(self) -> None:
        self.seen += self.recording
        self.now += 0 if self.recording else 1e-3

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        if not self.records:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recording = True
        yield
        self.recording = False

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self) -> None:
                device.now += 1e-3 * device.seen

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": self.graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize(("records", "how"), [(True, "graph"), (False, "events")])
def test_a_batch_lasts_as_long_as_it_should(monkeypatch, records, how):
    device = FakeDevice(records)
    device.patch(monkeypatch)
    batch = CudaClock(batch_seconds=0.04, least_calls=6).batch([device.call] * 3)
    assert (batch.calls, batch.how) == (42, how)  # whole passes over the three sets
    assert batch.run() == pytest.approx(0.042)
    assert CudaClock(batch_seconds=0.0, least_calls=6).batch([device.call] * 4).calls == 8
