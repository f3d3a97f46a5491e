"""Sum up what kernels cost, and compare two ways of doing the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from sympy import Add, Expr

from amber_compile.errors import OptionError, whole_number

from .break_even import break_even
from .kernel import Kernel, T


@dataclass(frozen=True)
class Work:
    """What several kernels do one after the other: ``kernels`` are pairs of one and its count."""

    kernels: Sequence[tuple[Kernel, int]] = ()

    @cached_property
    def macs(self) -> Expr:
        """Executed multiply-accumulates."""
        return Add(*(count * kernel.macs for kernel, count in self.kernels))

    @cached_property
    def bytes(self) -> Expr:
        """Bytes read and written."""
        return Add(*(count * kernel.bytes for kernel, count in self.kernels))

    @cached_property
    def seconds(self) -> Expr:
        """Time in seconds."""
        return Add(*(count * kernel.seconds for kernel, count in self.kernels))

    def at(self, tokens: int) -> dict[str, float]:
        """Return ``macs``, ``bytes`` and ``seconds`` at a token count.

        Raises:
            OptionError: unless ``tokens`` is a whole number of at least 1.
        """
        at = {T: whole_number("tokens", tokens, 1)}
        every = {"macs": self.macs, "bytes": self.bytes, "seconds": self.seconds}
        return {what: float(value.subs(at)) for what, value in every.items()}

    def times(self, count: int) -> Work:
        """Return ``count`` times as much."""
        return Work(tuple((kernel, count * own) for kernel, own in self.kernels))

    @classmethod
    def total(cls, works: Iterable[Work]) -> Work:
        """Return all that ``works`` do."""
        return cls(tuple(pair for work in works for pair in work.kernels))


@dataclass(frozen=True)
class Comparison:
    """Dense and sparse side by side."""

    dense: Work
    sparse: Work

    @cached_property
    def break_even(self) -> int | None:
        """The least token count from which sparse is faster, there and above; None if never."""
        return break_even(self.dense.seconds, self.sparse.seconds, T)

    def speedup(self, tokens: int, other: float = 0.0) -> float:
        """Return how many times faster sparse is.

        Args:
            tokens: of the call.
            other: share of the dense model's time that is not spent here, 0 to 1: attention, norms
                and all else that stays as it is (Amdahl's law).

        Raises:
            OptionError: if ``tokens`` is no whole number of at least 1 or ``other`` is no share.
        """
        if isinstance(other, bool) or not isinstance(other, int | float) or not 0 <= other < 1:
            raise OptionError(f"other={other!r} must be a share: at least 0, less than 1")
        dense, sparse = (work.at(tokens)["seconds"] for work in (self.dense, self.sparse))
        return 1 / (other + (1 - other) * sparse / dense) if dense else 1.0
