"""The errors a user can meet, each naming the argument, its value and the valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral

LISTED = 20
"""How many valid values an error lists; of more it names the closest only."""


class AmberError(Exception):
    """Base class of every error that Amber raises on purpose."""


class OptionError(AmberError, ValueError):
    """An option is unknown, malformed or contradicts another one."""


class PlanError(AmberError, ValueError):
    """A plan is damaged, of another version, or belongs to another model."""


class RewriteError(AmberError, RuntimeError):
    """A graph could not be rewritten as planned (raised under ``strict=True`` only)."""


class ReleasedError(AmberError, RuntimeError):
    """The values of a weight are wanted, and they were released (``decode="int8"``)."""


class VersionError(AmberError, RuntimeError):
    """The PyTorch at hand is none that Amber knows."""


class VerifyError(AmberError, AssertionError):
    """A pass left a graph that does not mean what it should: a bug in Amber."""


def choices(what: str, value: object, valid: Iterable[str | None]) -> str:
    """Return "unknown <what> <value>; did you mean ...? valid: ..." for an error message.

    Of many valid values only the closest are listed.
    """
    names = sorted(map(str, valid))
    close = difflib.get_close_matches(str(value), names)
    hint = f" did you mean {close[0]!r}?" if close else ""
    if len(names) <= LISTED:
        return f"unknown {what} {value!r};{hint} valid: {', '.join(names)}"
    near = f"; close to it: {', '.join(close)}" if close else ""
    return f"unknown {what} {value!r};{hint} none of the {len(names)} valid ones{near}"


def whole_number(what: str, value: object, least: int) -> int:
    """Return ``value`` as an int: one of Python's or NumPy's, at least ``least``.

    Raises:
        OptionError: for anything else; True and 4.0 are no whole numbers here.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise OptionError(f"{what}={value!r} must be a whole number >= {least}")
    return int(value)
