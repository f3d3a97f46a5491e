"""Amber: a ``torch.compile`` backend for training-free N:M activation sparsity in LLM prefill.

model = torch.compile(model, backend="amber")            # no import needed

AmberConfig      the options of one compilation
Plan             what to sparsify, one entry per projection, in a file
explain          what would be rewritten in a model, and why the rest would not
last_reports     what was rewritten in each compiled graph, and why the rest was not
check            the error of every site and of the output, dense and sparse side by side
bisect           which step and which site cause an error above a bound
refresh          weights were changed behind PyTorch's back
register_model   names for the weights of a model that is compiled in parts
"""

from typing import TYPE_CHECKING, Any

from . import _checkout  # noqa: F401  # finds the subpackages of a source checkout

# isort: split
from .config import AmberConfig
from .decision import Decision
from .derived import refresh
from .explain import explain
from .naming import register_model
from .pattern import Pattern
from .plan import Plan
from .projection import Projection
from .report import Report, last_reports
from .settings import Settings

__all__ = [
    "AmberConfig",
    "Decision",
    "Pattern",
    "Plan",
    "Projection",
    "Report",
    "Settings",
    "bisect",
    "check",
    "explain",
    "last_reports",
    "refresh",
    "register_model",
]

if TYPE_CHECKING:
    from .debug.bisect_sites import bisect
    from .debug.compare import check


def __getattr__(name: str) -> Any:
    """Import what loads Dynamo when it is first asked for: Amber itself is imported in no time."""
    if name == "check":
        from .debug.compare import check

        return check
    if name == "bisect":
        from .debug.bisect_sites import bisect

        return bisect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
