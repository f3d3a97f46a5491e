"""The passes: each analyses or rewrites an FX graph, one idea a file.

    find_projections        every matmul of activations by a parameter, with its qualified name
    classify_phase          prefill, decode or unknown, from the token dimension
    decide                  plan x projection x phase -> settings, or the reason it stays dense
    decide_quantization     plan x projection x phase -> 8 bits, or the reason it stays as it is
    sparsify_projections    an N:M selection in front of each projection decided sparse
    sharded_operands        the same where the weight is spread over processes
    quantize_projections    codes and scales in front of each projection decided quantised
    smooth_projections      smooth vectors into the norm or projection before, if that is asked for
    fuse_projections        selection and projection in one, where a sparse matrix unit takes both
    fuse_selections         selection and quantisation in one
    part_residuals          products apart from the residuals that Inductor joins to them
    spell_in_aten           what the passes insert, for a graph behind AOTAutograd or of an export
    find_permutations       which input channels may change places, and what moves with them
    verify                  the graph still means what it records

They run in this order. The first four look (``amber_compile/analysis.py``); then a copy of the
graph is changed and verified (``amber_compile/rewritten.py``).
"""

from amber_compile.passes.classify_phase import Phase, classify_phase
from amber_compile.passes.decide import decide
from amber_compile.passes.decide_quantization import decide_quantization
from amber_compile.passes.find_projections import find_projections
from amber_compile.passes.fuse_projections import fuse_projections
from amber_compile.passes.fuse_selections import fuse_selections
from amber_compile.passes.quantize_projections import quantize_projections
from amber_compile.passes.smooth_projections import smooth_projections
from amber_compile.passes.sparsify_projections import Sparsified, sparsify_projections
from amber_compile.passes.verify import verify

__all__ = [
    "Phase",
    "Sparsified",
    "classify_phase",
    "decide",
    "decide_quantization",
    "find_projections",
    "fuse_projections",
    "fuse_selections",
    "quantize_projections",
    "smooth_projections",
    "sparsify_projections",
    "verify",
]
