"""The passes: each analyses or rewrites an FX graph, one idea a file.

    find_projections        every matmul of activations by a parameter, with its qualified name
    classify_phase          prefill, decode or unknown, from the token dimension
    decide                  plan x projection x phase -> settings, or the reason it stays dense
    sparsify_projections    an N:M selection in front of each projection decided sparse
    fuse_projections        selection and projection in one, where a sparse matrix unit takes both
    verify                  the graph still means what it records

They run in this order. The first three look (``amber_compile/analysis.py``); then a copy of the
graph is changed and verified (``amber_compile/rewrite.py``).
"""

from amber_compile.passes.classify_phase import Phase, classify_phase
from amber_compile.passes.decide import decide
from amber_compile.passes.find_projections import find_projections
from amber_compile.passes.fuse_projections import fuse_projections
from amber_compile.passes.sparsify_projections import FactorInput, Sparsified, sparsify_projections
from amber_compile.passes.verify import verify

__all__ = [
    "FactorInput",
    "Phase",
    "Sparsified",
    "classify_phase",
    "decide",
    "find_projections",
    "fuse_projections",
    "sparsify_projections",
    "verify",
]
