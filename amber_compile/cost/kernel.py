"""What one kernel computes, moves and takes, as expressions in the token count.

R rows (T times a constant), K input channels, N output channels, E experts, b bytes an element, c
bytes an operand of the product: b, or 1 if it is quantised:

    kernel       multiply-accumulates   bytes                               seconds
    matmul       R·N·K                  c·(R·K + min(E, R)·N·K) + b·R·N     roofline
    2:4 matmul   R·N·K / 2              c·(R·K/2 + min(E, R)·N·K) + b·R·N   roofline
                                        + R·K/8 of metadata
    compress     0                      b·R·K + c·R·K/2 + R·K/8             bytes / selection rate
    select       0                      b·R·K + b·R·K                       bytes / selection rate
    quantize     0                      b·R·K + c·R·K                       bytes / selection rate

    roofline = max(operations / rate, bytes / bandwidth);   each takes the machine's overhead on top

``int8 matmul`` and the like say in what a product is computed. A format without a rate is taken to
run at that of the activations' type. A plain weight has E = 1, and is read once. Of experts no more
are read than there are rows. Left out: scales; that the last wave of tiles does not fill a GPU
(12 % of a matmul of 512 tokens on an H100, by counting tiles); that caches hold what was just
written.
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
        name: ``matmul``, ``int8 matmul``, ``2:4 int8 matmul``, ``compress``, ``select``,
            ``quantize`` ...
        macs: multiply-accumulates that it executes.
        traffic: bytes by what they are: ``activations in``, ``activations out``, ``weight``,
            ``values`` (kept ones), ``metadata`` (where they were) and ``codes``.
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

    def matmul(self, rows: Expr, shape: tuple[Expr | int, ...], codes: str | None = None) -> Kernel:
        """Return ``[R, K] @ [K, N]``, where ``shape`` is ``(N, K)`` or ``(E, N, K)``.

        ``codes`` is the format of both operands, if they are quantised.
        """
        *_, n, k = shape
        size = SIZES[codes or self.dtype]
        traffic = {"activations in": size * rows * k, **self._weight_and_out(rows, shape, codes)}
        macs = rows * n * k
        return self._roofline("matmul", macs, traffic, self.rates.dense, macs, codes)

    def sparse_matmul(
        self, rows: Expr, shape: tuple[Expr | int, ...], codes: str | None = None
    ) -> Kernel:
        """Return the same product with what :meth:`compress` wrote."""
        *_, n, k = shape
        out = self._weight_and_out(rows, shape, codes)
        traffic = {**self._compressed(rows * k, codes), **out}
        macs = rows * n * k
        return self._roofline("2:4 matmul", macs * KEPT, traffic, self.rates.sparse, macs, codes)

    def compress(self, rows: Expr, channels: int, codes: str | None = None) -> Kernel:
        """Return the pass that selects 2:4 and writes kept values, or codes, and metadata."""
        read = self._size * rows * channels
        traffic = {"activations in": read, **self._compressed(rows * channels, codes)}
        return self._selection("compress", traffic)

    def select(self, rows: Expr, channels: int) -> Kernel:
        """Return the pass that writes zeros over what is not selected."""
        moved = self._size * rows * channels
        return self._selection("select", {"activations in": moved, "activations out": moved})

    def quantize(self, rows: Expr, channels: int, codes: str) -> Kernel:
        """Return the pass that writes codes, of what is selected or of all."""
        elements = rows * channels
        traffic = {"activations in": self._size * elements, "codes": SIZES[codes] * elements}
        return self._selection("quantize", traffic)

    def _weight_and_out(
        self, rows: Expr, shape: tuple[Expr | int, ...], codes: str | None
    ) -> dict[str, Expr]:
        *experts, n, k = shape
        read = Min(*experts, rows) if experts else Integer(1)
        weight = SIZES[codes or self.dtype] * read * n * k
        return {"weight": weight, "activations out": self._size * rows * n}

    def _compressed(self, elements: Expr, codes: str | None) -> dict[str, Expr]:
        kept = SIZES[codes or self.dtype] * KEPT * elements
        return {"values": kept, "metadata": INDEX_BYTES * elements}

    def _roofline(
        self,
        name: str,
        macs: Expr,
        traffic: Mapping[str, Expr],
        rates: Mapping[str, float],
        dense_macs: Expr,
        codes: str | None,
    ) -> Kernel:
        format_ = codes if codes in rates else self.dtype
        if codes is not None:
            name = name.replace("matmul", f"{codes} matmul")
            name += "" if format_ == codes else f" at the rate of {self.dtype}"
        computing = 2 * dense_macs / exact(rates[str(format_)])
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
