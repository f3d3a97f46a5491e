"""Amber: a ``torch.compile`` backend for training-free N:M activation sparsity in LLM prefill.

model = torch.compile(model, backend="amber")            # no import needed

AmberConfig      the options of one compilation
Plan             what to sparsify, one entry per projection, in a file
last_reports     what was rewritten in each compiled graph, and why the rest was not
refresh          weights were changed behind PyTorch's back
register_model   names for the weights of a model that is compiled in parts
"""

import os as _os


def _use_checkout_folders() -> None:
    """Find ``passes`` and ``kernels`` beside this folder when it lies in a source checkout.

    An installed wheel holds them inside the package; a checkout on ``sys.path`` does not.
    """
    inside = _os.path.dirname(_os.path.abspath(__file__))
    root = _os.path.dirname(inside)
    is_checkout = _os.path.isfile(_os.path.join(root, "pyproject.toml"))
    if is_checkout and not _os.path.isdir(_os.path.join(inside, "passes")):
        __path__.append(root)


_use_checkout_folders()

from .config import AmberConfig  # noqa: E402  # the subpackages must be found first
from .decision import Decision  # noqa: E402
from .derived import refresh  # noqa: E402
from .naming import register_model  # noqa: E402
from .pattern import Pattern  # noqa: E402
from .plan import Plan  # noqa: E402
from .projection import Projection  # noqa: E402
from .report import Report, last_reports  # noqa: E402
from .settings import Settings  # noqa: E402

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
