"""Amber: a ``torch.compile`` backend for training-free N:M activation sparsity in LLM prefill.

model = torch.compile(model, backend="amber")            # no import needed

AmberConfig      the options of one compilation
Plan             what to sparsify, one entry per projection, in a file
explain          what would be rewritten in a model, and why the rest would not
last_reports     what was rewritten in each compiled graph, and why the rest was not
calibrate        a plan for a model, from its user's text
evaluate         what a plan or options cost: loss, KL, top-1 agreement
permute_channels the channel order that a plan was made for, folded into the weights
check            the error of every site and of the output, dense and sparse side by side
bisect           which step and which site cause an error above a bound
restore          values for weights that decode= released
rewrite          a program that somebody else compiles, runs or saves: FX graph, exported program
refresh          weights were changed behind PyTorch's back
register_model   names for the weights of a model that is compiled in parts
"""

from importlib import import_module
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
    "calibrate",
    "check",
    "evaluate",
    "explain",
    "last_reports",
    "permute_channels",
    "refresh",
    "register_model",
    "restore",
    "rewrite",
]

if TYPE_CHECKING:
    from .calibration.calibrate import calibrate
    from .debug.bisect_sites import bisect
    from .debug.compare import check
    from .evaluation import evaluate
    from .permute import permute_channels
    from .programs import rewrite
    from .release import restore

LATER = {
    "bisect": "debug.bisect_sites",
    "calibrate": "calibration",
    "check": "debug.compare",
    "evaluate": "evaluation",
    "permute_channels": "permute",
    "restore": "release",
    "rewrite": "programs",
}
"""Names that are imported when they are first asked for: Amber itself is imported in no time."""


def __getattr__(name: str) -> Any:
    """Import what :data:`LATER` says."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{LATER[name]}", __name__), name)
