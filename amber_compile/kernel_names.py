"""Name what runs a projection, for the reports.

    sparse, on a CPU                nm_select, C++
    sparse, on a GPU                nm_linear, 2:4 tensor cores; or nm_select, Triton; why not
    quantised, on a CPU             quantize_rows, AVX-512 VNNI: what multiplies the codes
    sparse and quantised            nm_quantize, AVX-512 VNNI
    the same, on a GPU              nm_quantized_linear, 2:4 tensor cores; or nm_quantize; why not

What a kernel lacks stands behind a semicolon. A dense projection is the compiler's own.
"""

from __future__ import annotations

from .decision import Decision
from .kernels.codes import CODES
from .kernels.nm_linear import kernel_of as kernel_of_both
from .kernels.nm_linear import why_masked
from .kernels.nm_quantize import kernel_for as kernel_for_codes
from .kernels.nm_select import kernel_for
from .kernels.quantized_linear import kernel_for as kernel_for_product
from .passes.fuse_projections import why_separate
from .projection import Projection, fake


def kernel_of(projection: Projection, decision: Decision) -> str:
    """Return what runs a projection; on a GPU, why no sparse unit multiplies, if so."""
    if decision.quantization is not None:
        return _quantized(projection, decision, decision.quantization.dtype)
    if decision.settings is None:
        return ""
    x, reason = fake(projection.x), why_separate(projection, decision.settings)
    if reason is None:
        return kernel_of_both(x, fake(projection.weight))
    selected = f"nm_select, {kernel_for(x)}"
    return f"{selected}; {reason}" if x.device.type == "cuda" else selected


def _quantized(projection: Projection, decision: Decision, dtype: str) -> str:
    x, settings = fake(projection.x), decision.settings
    rows, channels = projection.shape
    codes = x.new_empty((rows, channels), dtype=CODES[dtype])
    reason = None
    if settings is not None:
        how = settings.pattern.n, settings.pattern.m, settings.correction
        reason = why_masked(x, codes, *how)
        if reason is None:
            return kernel_of_both(x, codes)
    operator = "quantize_rows" if settings is None else "nm_quantize"
    product = kernel_for_product(codes)
    if x.device.type == "cpu" and dtype == "fp8":
        return f"{operator}, {product}; fp8 is emulated on a CPU: for its accuracy, not for speed"
    if x.device.type == "cpu":
        return f"{operator}, {product}"
    named = f"{operator}, {kernel_for_codes(x, dtype)} + {product}"
    return named if reason is None else f"{named}; {reason}"
