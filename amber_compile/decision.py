"""What was decided for one projection: how it is sparsified, or the reason it stays dense."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Settings


@dataclass(frozen=True, slots=True)
class Decision:
    """Exactly one of ``settings`` (sparse) and ``reason`` (dense) is set.

    Attributes:
        settings: how the site selects, if it is sparse.
        reason: why it stays dense, in words for the report.
        obstacle: True where the plan wanted the site sparse and something else prevents it:
            what ``strict=True`` turns into an error.
    """

    settings: Settings | None = None
    reason: str | None = None
    obstacle: bool = False

    def __post_init__(self) -> None:
        if (self.settings is None) == (self.reason is None):
            raise ValueError("a Decision is either sparse (settings) or dense (reason)")

    @property
    def sparse(self) -> bool:
        """Whether the site is sparsified."""
        return self.settings is not None

    @property
    def density(self) -> float:
        """Share of its input channels that the site reads: 1 if it is dense."""
        return self.settings.pattern.density if self.settings else 1.0

    def __str__(self) -> str:
        return str(self.settings) if self.sparse else f"dense: {self.reason}"


def sparse(settings: Settings) -> Decision:
    """Return the decision to sparsify a site."""
    return Decision(settings=settings)


def dense(reason: str) -> Decision:
    """Return the decision to leave a site dense, as planned."""
    return Decision(reason=reason)


def blocked(reason: str) -> Decision:
    """Return the decision to leave a site dense although the plan wanted it sparse."""
    return Decision(reason=reason, obstacle=True)
