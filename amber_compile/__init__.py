"""Amber: a ``torch.compile`` backend for training-free N:M activation sparsity in LLM prefill.

model = torch.compile(model, backend="amber")            # no import needed

AmberConfig      the options of one compilation
Plan             what to sparsify, one entry per projection, in a file
last_reports     what was rewritten in each compiled graph, and why the rest was not
refresh          weights were changed behind PyTorch's back
register_model   names for the weights of a model that is compiled in parts
"""

from . import _checkout  # noqa: F401  # finds the subpackages of a source checkout

# isort: split
from .config import AmberConfig
from .decision import Decision
from .derived import refresh
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
    "last_reports",
    "refresh",
    "register_model",
]
