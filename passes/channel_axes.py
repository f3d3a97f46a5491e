"""Axes of tensors as factors of their dimensions, so that channels can be followed through a graph.

    v = linear(x, w)              [B, S, C]          C: the rows of w
    v.view(B, S, G, D)            [B, S, G, D]       C is G x D from here on, in w as well
    v[:, :, :, None].expand(...)  [B, S, G, R, D]    R: nothing differs along it
    o.reshape(B, S, G * R * D)    [B, S, (G, R, D)]  a dimension of three axes, outermost first

Axes that a computation takes as one become one (``unify``). An axis is *blocked*, with a reason,
where its order matters; a part of an axis (``chunk``) is an axis of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Dim = tuple["Axis", ...]
Dims = tuple[Dim, ...]


class Axis:
    """A factor of a dimension.

    Attributes:
        size: how many elements it has.
        blocked: why its elements must stay in order, or None.
        parts: ``(start, stop)`` -> the axis of these elements, for parts taken out of it.
    """

    __slots__ = ("_factors", "_same_as", "blocked", "parts", "size")

    def __init__(self, size: int, blocked: str | None = None) -> None:
        self.size = size
        self.blocked = blocked
        self.parts: dict[tuple[int, int], Axis] = {}
        self._same_as: Axis | None = None
        self._factors: tuple[Axis, Axis] | None = None

    @property
    def leaves(self) -> list[Axis]:
        """The axes it consists of by now, outermost first."""
        axis = self
        while axis._same_as is not None:
            axis = axis._same_as
        if axis is not self:
            self._same_as = axis  # a shorter way next time
        if axis._factors is None:
            return [axis]
        return [leaf for factor in axis._factors for leaf in factor.leaves]

    def split(self, outer: int) -> tuple[Axis, Axis]:
        """Make a leaf a product of two axes."""
        if self.parts:
            block([self], "it is cut into parts and regrouped")
        self._factors = Axis(outer, self.blocked), Axis(self.size // outer, self.blocked)
        return self._factors

    def join(self, other: Axis) -> None:
        """Make this leaf the same as another of its size."""
        self._same_as = other
        if self.blocked:
            block([other], self.blocked)
        for place, part in self.parts.items():
            unify((part,), (other.part(*place),))

    def part(self, start: int, stop: int) -> Axis:
        """Return the axis of some elements of a leaf; parts that overlap are blocked."""
        found = self.parts.setdefault((start, stop), Axis(stop - start, self.blocked))
        for (first, last), other in self.parts.items():
            if other is not found and first < stop and start < last:
                block([found, other], "parts of it overlap")
        return found


def leaves(dim: Iterable[Axis]) -> list[Axis]:
    """Return what a dimension consists of by now, outermost first."""
    return [leaf for axis in dim for leaf in axis.leaves]


def size_of(dim: Iterable[Axis]) -> int:
    """Return the number of elements of a dimension."""
    return math.prod(axis.size for axis in dim)


def fresh(size: int, blocked: str | None = None) -> Dim:
    """Return a dimension of an axis of its own; none for a single element."""
    return (Axis(size, blocked),) if size != 1 else ()


def block(dim: Iterable[Axis], reason: str) -> None:
    """Keep the axes of a dimension, and all parts of them, in order; the first reason stays."""
    for leaf in leaves(dim):
        leaf.blocked = leaf.blocked or reason
        block(leaf.parts.values(), reason)


def unify(one: Dim, other: Dim) -> None:
    """Make two dimensions of one size the same; block them if their groupings do not match."""
    left, right = leaves(one), leaves(other)
    while left and right:
        a, b = left[0], right[0]
        if a is not b and a.size == b.size:
            a.join(b)
        elif a.size > b.size and a.size % b.size == 0:
            a.split(b.size)
        elif b.size > a.size and b.size % a.size == 0:
            b.split(a.size)
        elif a is not b:
            break
        left, right = leaves(left), leaves(right)
        if left[0] is right[0]:
            left, right = left[1:], right[1:]
    if left or right:
        block([*left, *right], "two groupings of it meet that do not match")


def regroup(dims: Dims, sizes: Sequence[int]) -> Dims | None:
    """Return the dimensions of a view of ``sizes``, in row-major order; None if axes straddle."""
    flat = leaves(axis for dim in dims for axis in dim)
    found: list[Dim] = []
    for size in sizes:
        taken: list[Axis] = []
        while (need := size // size_of(taken)) != 1:
            if not flat:
                return None
            axis, flat = flat[0], flat[1:]
            if need % axis.size:
                if axis.size % need:
                    return None
                axis, rest = axis.split(need)
                flat = leaves([rest, *flat])
            taken.append(axis)
        found.append(tuple(taken))
    return None if flat else tuple(found)
