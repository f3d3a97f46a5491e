"""What one kernel computes, moves and takes, as expressions in the token count.

R rows (T times a constant), K input channels, N output channels, E experts, b bytes an element:

    kernel       multiply-accumulates   bytes                               seconds
    matmul       R·N·K                  b·(R·K + min(E, R)·N·K + R·N)       roofline
    2:4 matmul   R·N·K / 2              b·(R·K/2 + min(E, R)·N·K + R·N)     roofline
                                        + R·K/8 of metadata
    compress     0                      b·(R·K + R·K/2) + R·K/8             bytes / selection rate
    select       0                      b·(R·K + R·K)                       bytes / selection rate

    roofline = max(operations / rate, bytes / bandwidth);   each takes the machine's overhead on top

A plain weight has E = 1, and is read once. Of experts no more are read than there are rows. Left
out: that the last wave of tiles does not fill a GPU (12 % of a matmul of 512 tokens on an H100, by
counting tiles), and that caches hold what was just written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from sympy import Add, Expr, Integer, Max, Min, Rational, Symbol

from .rates import SIZES, Rates

T = Symbol("T", positive=True)
"""The tokens of a call: all sequences together."""

KEPT = Rational(1, 2)
"""Share of the channels that a 2:4 matmul reads."""
INDEX_BYTES = Rational(1, 8)
"""Metadata for each channel before the selection: two bits for each that is kept."""


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: ``matmul``, ``2:4 matmul``, ``compress`` or ``select``.
        macs: multiply-accumulates that it executes.
        traffic: bytes by what they are: ``activations in``, ``activations out``, ``weight``,
            ``values`` (kept ones) and ``metadata`` (where they were).
        seconds: how long it takes.
    """

    name: str
    macs: Expr
    traffic: Mapping[str, Expr]
    seconds: Expr

    @property
    def bytes(self) -> Expr:
        """All bytes that it reads or writes."""
        return Add(*self.traffic.values())


@dataclass(frozen=True)
class Kernels:
    """Makes the kernels of projections on one machine, in one dtype.

    Raises:
        OptionError: if the machine has no rate for ``dtype``.
    """

    rates: Rates
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.rates.check_dtype(self.dtype))

    @property
    def _size(self) -> int:
        return SIZES[self.dtype]

    def matmul(self, rows: Expr, shape: tuple[Expr | int, ...]) -> Kernel:
        """Return ``[R, K] @ [K, N]``, where ``shape`` is ``(N, K)`` or ``(E, N, K)``."""
        *_, n, k = shape
        traffic = {"activations in": self._size * rows * k, **self._weight_and_out(rows, shape)}
        macs = rows * n * k
        return self._roofline("matmul", macs, traffic, self.rates.dense, macs)

    def sparse_matmul(self, rows: Expr, shape: tuple[Expr | int, ...]) -> Kernel:
        """Return the same product with what :meth:`compress` wrote."""
        *_, n, k = shape
        traffic = {**self._compressed(rows * k), **self._weight_and_out(rows, shape)}
        macs = rows * n * k
        return self._roofline("2:4 matmul", macs * KEPT, traffic, self.rates.sparse, macs)

    def compress(self, rows: Expr, channels: int) -> Kernel:
        """Return the pass that selects 2:4 and writes kept values and metadata."""
        read = self._size * rows * channels
        traffic = {"activations in": read, **self._compressed(rows * channels)}
        return self._selection("compress", traffic)

    def select(self, rows: Expr, channels: int) -> Kernel:
        """Return the pass that writes zeros over what is not selected."""
        moved = self._size * rows * channels
        return self._selection("select", {"activations in": moved, "activations out": moved})

    def _weight_and_out(self, rows: Expr, shape: tuple[Expr | int, ...]) -> dict[str, Expr]:
        *experts, n, k = shape
        read = Min(*experts, rows) if experts else Integer(1)
        return {"weight": self._size * read * n * k, "activations out": self._size * rows * n}

    def _compressed(self, elements: Expr) -> dict[str, Expr]:
        return {"values": self._size * KEPT * elements, "metadata": INDEX_BYTES * elements}

    def _roofline(
        self,
        name: str,
        macs: Expr,
        traffic: Mapping[str, Expr],
        rates: Mapping[str, float],
        dense_macs: Expr,
    ) -> Kernel:
        computing = 2 * dense_macs / exact(rates[self.dtype])
        moving = Add(*traffic.values()) / exact(self.rates.bandwidth)
        return Kernel(name, macs, traffic, Max(computing, moving) + exact(self.rates.overhead))

    def _selection(self, name: str, traffic: Mapping[str, Expr]) -> Kernel:
        bandwidth = exact(self.rates.bandwidth) * exact(self.rates.select)
        seconds = Add(*traffic.values()) / bandwidth + exact(self.rates.overhead)
        return Kernel(name, Integer(0), traffic, seconds)


def exact(value: float) -> Rational:
    """Return the number that ``value`` is written as: 3e-06 is 3/1000000."""
    return Rational(repr(float(value)))


def ratio(value: float) -> Rational:
    """Return the simple fraction (denominator up to 2^20) that ``value`` was computed from."""
    return Rational(Fraction(value).limit_denominator(1 << 20))
