"""The passes: each analyses or rewrites an FX graph, one idea a file.

    find_projections        every matmul of activations by a parameter, with its qualified name
    classify_phase          prefill, decode or unknown, from the token dimension
    decide                  plan x projection x phase -> settings, or the reason it stays dense
    sparsify_projections    an N:M selection in front of each projection decided sparse
    verify                  the graph still means what it records

All sites are analysed before any is changed, on a copy of the graph: ``amber_compile/rewrite.py``
runs them in this order.
"""

from .classify_phase import Phase, classify_phase
from .decide import decide
from .find_projections import find_projections
from .sparsify_projections import FactorInput, Sparsified, sparsify_projections
from .verify import verify

__all__ = [
    "FactorInput",
    "Phase",
    "Sparsified",
    "classify_phase",
    "decide",
    "find_projections",
    "sparsify_projections",
    "verify",
]
