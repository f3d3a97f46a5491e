"""What was decided for one projection: how it is sparsified, or the reason it stays dense.

Whether it is quantised is decided apart: a dense projection may be, and a sparse one need not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .quantization import Quantization
from .settings import Settings


@dataclass(frozen=True, slots=True)
class Decision:
    """Exactly one of ``settings`` (sparse) and ``reason`` (dense) is set.

    Attributes:
        settings: how the site selects, if it is sparse.
        reason: why it stays dense, in words for the report.
        obstacle: True where the plan wanted the site sparse and something else prevents it:
            what ``strict=True`` turns into an error.
        quantization: how it is quantised, if it is.
        unquantized: why it is not, where that was asked for.
        unquantized_obstacle: as ``obstacle``, of quantising.
    """

    settings: Settings | None = None
    reason: str | None = None
    obstacle: bool = False
    quantization: Quantization | None = None
    unquantized: str | None = None
    unquantized_obstacle: bool = False

    def __post_init__(self) -> None:
        if (self.settings is None) == (self.reason is None):
            raise ValueError("a Decision is either sparse (settings) or dense (reason)")
        if self.quantization is not None and self.unquantized is not None:
            raise ValueError("a Decision is either quantised or has a reason why not")

    @property
    def sparse(self) -> bool:
        """Whether the site is sparsified."""
        return self.settings is not None

    @property
    def density(self) -> float:
        """Share of its input channels that the site reads: 1 if it is dense."""
        return self.settings.pattern.density if self.settings else 1.0

    def __str__(self) -> str:
        words = str(self.settings) if self.sparse else f"dense: {self.reason}"
        return f"{words}; {self.quantization}" if self.quantization else words

    @property
    def rewritten(self) -> bool:
        """Whether a pass has something to do."""
        return self.sparse or self.quantization is not None


def sparse(settings: Settings) -> Decision:
    """Return the decision to sparsify a site."""
    return Decision(settings=settings)


def dense(reason: str) -> Decision:
    """Return the decision to leave a site dense, as planned."""
    return Decision(reason=reason)


def blocked(reason: str) -> Decision:
    """Return the decision to leave a site dense although the plan wanted it sparse."""
    return Decision(reason=reason, obstacle=True)


def unquantized(decision: Decision, reason: str) -> Decision:
    """Return ``decision`` without the quantisation that was wanted, for ``reason``."""
    return replace(decision, quantization=None, unquantized=reason, unquantized_obstacle=True)
