"""N:M patterns: of every M consecutive input channels of a token, the N best are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import OptionError

MAX_GROUP = 32
_WRITTEN = re.compile(r"\s*(\d{1,3})\s*:\s*(\d{1,3})\s*")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Keep ``n`` of every ``m`` consecutive channels; prints ``n:m``.

    Raises:
        OptionError: unless 1 <= n <= m <= 32 and m is a power of two.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        n, m = self.n, self.m
        whole = type(n) is int and type(m) is int
        if not (whole and 1 <= n <= m <= MAX_GROUP and m & (m - 1) == 0):
            raise OptionError(
                f"pattern={n!r}:{m!r} is not an N:M pattern; "
                f"valid: 1 <= N <= M <= {MAX_GROUP} with M a power of two, such as 2:4, 4:8, 8:16"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of channels that is kept."""
        return self.n / self.m

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read ``"N:M"``.

        Raises:
            OptionError: if ``text`` is not two whole numbers with a colon between, or out of range.
        """
        if isinstance(text, Pattern):
            return text
        match = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise OptionError(f"pattern={text!r} is malformed; write it as 'N:M', such as '2:4'")
        return cls(int(match[1]), int(match[2]))
