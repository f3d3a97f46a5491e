"""Shared memory and mbarriers for kernels that run on NumPy, with races and deadlocks found.

Every partition of a kernel is a thread, and one runs at a time: until it waits or ends. What it
may rely on does not depend on that order, since every access is checked against vector clocks:

    agent 2p       partition p, in its program order
    agent 2p + 1   the copies that p has issued and that land at a time of their own

An access is a ``Race`` unless all that it may collide with happened before it: a read, the write
it reads; a write, the write and the reads before it. An mbarrier passes the knowledge of those that
arrive to those that wait; bytes that a TMA copy delivers pass on that copy. A ``cp.async`` is known
after ``wait_group`` and a barrier, and may overwrite what was read before the last barrier.

Reading what nobody wrote is an error, and so are copies in flight at the end, a barrier that is
arrived at too often, and a state in which every partition waits (``DeadLock``, at once).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

SIZE = 227 * 1024  # what a block may have on sm_90
GRANULE = 16  # bytes that are tracked together
AGENTS = 16


class Race(AssertionError):
    """Two accesses of shared memory collide, and nothing orders them."""


class DeadLock(AssertionError):
    """Every partition that has not ended waits for an mbarrier."""


class Partition(threading.local):
    """What the thread of a partition knows: which agents it has heard of, and up to where."""

    def __init__(self) -> None:
        self.number = 0
        self.clock = np.zeros(AGENTS, np.int64)  # what happened before
        self.copies_know = np.zeros(AGENTS, np.int64)  # what happened before a cp.async
        self.groups: list[int] = []  # cp.async: the last copy of every committed group
        self.landed = 0

    @property
    def copies(self) -> int:
        return 2 * self.number + 1

    def tick(self) -> None:
        self.clock[2 * self.number] += 1


class SharedMemory:
    """The bytes of one block, who has written and read them, and the turn of the partitions."""

    def __init__(self) -> None:
        self.bytes = np.full(SIZE, 0xFF, np.uint8)  # NaN in every floating-point type
        self.allocated = 0
        granules = SIZE // GRANULE
        self.writer = np.full(granules, -1)
        self.written = np.zeros(granules, np.int64)
        self.reads = np.zeros((AGENTS, granules), np.int64)
        self.issued = np.zeros(AGENTS, np.int64)  # copies, by agent
        self.me = Partition()
        self.turn = threading.Condition()
        self.running = 1
        self.waiting: dict[int, Callable[[], bool]] = {}

    def allocate(self, size: int, alignment: int) -> int:
        start = -(-self.allocated // alignment) * alignment
        self.allocated = start + size
        if self.allocated > SIZE:
            raise MemoryError(f"{self.allocated} bytes of shared memory; valid: up to {SIZE}")
        return start

    # ---- accesses

    def read(self, addresses: np.ndarray) -> np.ndarray:
        """Return the bytes at ``addresses``, which the partition must know to be there."""
        granules = np.unique(addresses // GRANULE)
        unwritten = granules[self.writer[granules] < 0]
        if len(unwritten):
            raise Race(f"byte {unwritten[0] * GRANULE} is read, but nothing wrote it")
        self._check_order(granules, self.me.clock, "read")
        self.me.tick()
        self.reads[2 * self.me.number, granules] = self.me.clock[2 * self.me.number]
        return self.bytes[addresses]

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """Write as the partition itself does (st.shared)."""
        self.me.tick()
        agent = 2 * self.me.number
        self._write(addresses, data, self.me.clock, agent, int(self.me.clock[agent]))

    def copy(self, addresses: np.ndarray, data: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Write as a copy does that was issued knowing ``known``; return the clock after it."""
        agent = self.me.copies
        self.issued[agent] += 1
        self._write(addresses, data, known, agent, int(self.issued[agent]))
        after = known.copy()
        after[agent] = self.issued[agent]
        return after

    def _write(
        self, addresses: np.ndarray, data: np.ndarray, known: np.ndarray, agent: int, at: int
    ) -> None:
        granules = np.unique(addresses // GRANULE)
        self._check_order(granules, known, "overwritten")
        late = self.reads[:, granules] > known[:, None]
        if late.any():
            reader = int(np.nonzero(late.any(1))[0][0])
            raise Race(
                f"byte {granules[late.any(0)][0] * GRANULE} is overwritten by agent {agent} "
                f"while agent {reader} may still read it"
            )
        self.bytes[addresses] = data
        self.writer[granules], self.written[granules] = agent, at

    def _check_order(self, granules: np.ndarray, known: np.ndarray, verb: str) -> None:
        writer = self.writer[granules]
        unknown = (writer >= 0) & (self.written[granules] > known[writer])
        if unknown.any():
            raise Race(
                f"byte {granules[unknown][0] * GRANULE} is {verb} while a write of agent "
                f"{writer[unknown][0]} may be under way"
            )

    # ---- cp.async

    def commit_group(self) -> None:
        self.me.groups.append(int(self.issued[self.me.copies]))

    def wait_group(self, pending: int) -> None:
        done = self.me.groups[: max(0, len(self.me.groups) - pending)]
        self.me.landed = max([self.me.landed, *done])

    def barrier(self) -> None:
        """Wait for all threads of the partition: they share what they know."""
        self.me.clock[self.me.copies] = max(self.me.clock[self.me.copies], self.me.landed)
        self.me.copies_know = self.me.clock.copy()

    # ---- partitions

    def run(self, partitions: Sequence[Callable[[], None]]) -> None:
        """Run the partitions at once, each in a thread; raise what the first to fail raised."""
        errors: list[BaseException] = []
        before = self.me.clock.copy()
        ends = [before]

        def body(number: int, partition: Callable[[], None]) -> None:
            with self.turn:
                self.me.number, self.me.clock = number, before.copy()
                self.me.copies_know = before.copy()
                try:
                    partition()
                except BaseException as error:
                    errors.append(error)
                ends.append(self.me.clock)
                self.running -= 1
                self.turn.notify_all()

        self.running = len(partitions)
        threads = [threading.Thread(target=body, args=item) for item in enumerate(partitions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self.running, self.me.clock = 1, np.max(ends, axis=0)

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        """Give up the turn until ``reached``; raise ``DeadLock`` if that cannot happen."""
        with self.turn:
            self.waiting[self.me.number] = reached
            while not reached():
                stuck = not any(ready() for ready in self.waiting.values())
                if stuck and len(self.waiting) >= self.running:
                    del self.waiting[self.me.number]
                    raise DeadLock(f"every partition waits; partition {self.me.number} for {what}")
                self.turn.wait()
            del self.waiting[self.me.number]

    def check_end(self) -> None:
        """Raise unless all copies have landed to someone's knowledge."""
        self.barrier()
        late = np.nonzero(self.issued > self.me.clock)[0]
        if len(late):
            raise Race(f"the kernel ends while copies of agent {late[0]} may be in flight")


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes have landed."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.count = self.pending = self.bytes = self.phase = 0
        self.coming = np.zeros(AGENTS, np.int64)  # what those know who arrived in this phase
        self.known = np.zeros(AGENTS, np.int64)  # ... in the phases that have ended

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        if not self.count:
            raise AssertionError("an mbarrier is used before it is initialised")
        if count > self.pending:
            raise AssertionError(f"an mbarrier of count {self.count} is arrived at too often")
        self.memory.me.tick()
        self.coming = np.maximum(self.coming, self.memory.me.clock)
        self.bytes += expected
        self.pending -= count
        self._advance()

    def land(self, size: int, clock: np.ndarray) -> None:
        """Take ``size`` bytes that a copy has delivered."""
        if size > self.bytes:
            raise AssertionError(f"{size} bytes land where {self.bytes} are expected")
        self.coming = np.maximum(self.coming, clock)
        self.bytes -= size
        self._advance()

    def wait(self, phase: int) -> None:
        if phase not in (0, 1):
            raise AssertionError(f"phase {phase} of an mbarrier; valid: 0, 1")
        self.memory.wait_until(lambda: self.phase != phase, f"phase {phase} of an mbarrier")
        self.memory.me.clock = np.maximum(self.memory.me.clock, self.known)

    def _advance(self) -> None:
        if self.pending or self.bytes:
            return
        self.phase ^= 1
        self.pending = self.count
        self.known = self.coming.copy()
        with self.memory.turn:
            self.memory.turn.notify_all()
