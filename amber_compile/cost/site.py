"""Say what kernels a projection runs as, dense and sparse.

    projection                 kernels
    dense                      matmul
    sparse, on a sparse unit   compress, 2:4 matmul
    sparse, elsewhere          select, matmul
    sparse in part             the same on that part of its outputs, and a matmul for the others
    quantised                  quantize, int8 matmul
    both, on a sparse unit     compress, 2:4 int8 matmul; elsewhere as quantised

A sparse unit serves what ``nm_linear`` lets it: 2:4, never 4:8 or 8:16; here for any token count.
Every projection is given a selection or codes of its own, though q and k may share them. What a
correction or a dense prefix adds is left out.
"""

from __future__ import annotations

from sympy import Expr

from amber_compile.report import Site

from .kernel import Kernel, Kernels, T, ratio
from .rates import Rates
from .work import Work


def dense_work(site: Site, kernels: Kernels) -> Work:
    """Return what a projection costs without sparsity; one that is never called, nothing."""
    return Work(((kernels.matmul(_rows(site), site.shape), 1),) if site.macs else ())


def sparse_work(site: Site, kernels: Kernels) -> Work:
    """Return what a projection costs as it was decided."""
    settings, codes = site.decision.settings, format_of(site)
    share = ratio(site.share) if settings else 0
    if not site.macs or not (share or codes):
        return dense_work(site, kernels)
    *experts, n, k = site.shape
    part, rest, rows = (*experts, share * n, k), (*experts, (1 - share) * n, k), _rows(site)
    if share and why_masked(site, kernels.rates, kernels.dtype) is None:
        made = [kernels.compress(rows, k, codes), kernels.sparse_matmul(rows, part, codes)]
    elif share:
        made = [_selected(kernels, rows, k, codes), kernels.matmul(rows, part, codes)]
    else:
        made = []
    if share != 1:
        made += [kernels.quantize(rows, k, codes)] if codes else []
        made.append(kernels.matmul(rows, rest, codes))
    return Work(tuple((kernel, 1) for kernel in made))


def format_of(site: Site) -> str | None:
    """Return to what a projection is quantised, if it is."""
    chosen = site.decision.quantization
    return chosen.dtype if chosen else None


def _selected(kernels: Kernels, rows: Expr, channels: int, codes: str | None) -> Kernel:
    """Return the pass that selects where no sparse unit multiplies."""
    return kernels.quantize(rows, channels, codes) if codes else kernels.select(rows, channels)


def why_masked(site: Site, rates: Rates, dtype: str) -> str | None:
    """Return why no sparse unit multiplies a sparse site on a machine, or None if one does.

    The rules of ``nm_linear``, as far as a report has what they ask for.
    """
    settings = site.decision.settings
    if settings is None:
        return "it is dense"
    *experts, n, k = site.shape
    dtype = format_of(site) or dtype
    if not rates.has_sparse_unit(settings.pattern, dtype):
        return f"{rates.name} has no sparse unit for {settings.pattern} in {dtype}"
    if experts or site.operator != "linear":
        return f"{site.operator} has no sparse kernel"
    if settings.correction == "variance":
        return "the variance correction shifts what a sparse unit would only scale"
    if k % 64 or site.share * n % 8:
        return f"a sparse unit takes N, K in multiples of 8 and 64, not {n}, {k}"
    return None


def _rows(site: Site) -> Expr:
    """Return the rows that a projection multiplies: experts see a token several times."""
    *_, n, k = site.shape
    return T * ratio(site.macs / (n * k))
