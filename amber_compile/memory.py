"""What the weights of a model's projections occupy, before and after they are quantised.

    before = W                      after = W - released + codes and scales

Each projection counts once, also where several share a weight. Score factors and other vectors of
one number a channel are left out: they are a thousandth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .site import Site


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of weights.

    Attributes:
        weights: as the model has them.
        codes: of those that are quantised, beside them.
        released: of ``weights``, given up for their codes (``decode=``).
    """

    weights: int = 0
    codes: int = 0
    released: int = 0

    @classmethod
    def of(cls, sites: Iterable[Site], released: Collection[str]) -> Memory:
        """Sum up sites; ``released`` are the names of those that gave up their values."""
        own = list(sites)
        return cls(
            sum(site.weight_bytes for site in own),
            sum(site.code_bytes for site in own),
            sum(site.weight_bytes for site in own if site.name in released),
        )

    @property
    def before(self) -> int:
        """What the weights occupy without Amber."""
        return self.weights

    @property
    def after(self) -> int:
        """What weights and codes occupy."""
        return self.weights - self.released + self.codes

    def to_json(self) -> dict[str, int]:
        """Return the bytes by their names."""
        names = ("before", "after", "codes", "released")
        return {name: getattr(self, name) for name in names}

    def text(self, *, estimated: bool = False) -> str:
        """Return the bytes as a sentence; "" if nothing is quantised."""
        if not self.codes:
            return ""
        what = "weights of the projections" + ", estimated" * estimated
        released = f", {readable(self.released)} released" if self.released else ""
        return (
            f"{what}: {readable(self.before)} before, {readable(self.after)} after "
            f"({readable(self.codes)} in 8 bits{released})"
        )


def readable(size: float) -> str:
    """Return a number of bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
