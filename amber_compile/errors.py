"""The errors a user can meet, each naming the argument, its value and the valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AmberError(Exception):
    """Base class of every error that Amber raises on purpose."""


class OptionError(AmberError, ValueError):
    """An option is unknown, malformed or contradicts another one."""


class PlanError(AmberError, ValueError):
    """A plan is damaged, of another version, or belongs to another model."""


class RewriteError(AmberError, RuntimeError):
    """A graph could not be rewritten as planned (raised under ``strict=True`` only)."""


class VerifyError(AmberError, AssertionError):
    """A pass left a graph that does not mean what it should: a bug in Amber."""


def choices(what: str, value: object, valid: Iterable[str]) -> str:
    """Return "unknown <what> <value>; did you mean ...? Valid: ..." for an error message."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {value!r};{hint} valid: {', '.join(names)}"
