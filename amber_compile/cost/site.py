"""Say what kernels a projection runs as, dense and sparse.

    projection                 kernels
    dense                      matmul
    sparse, on a sparse unit   compress, 2:4 matmul
    sparse, elsewhere          select, matmul
    sparse in part             the same on that part of its outputs, and a matmul for the others

A sparse unit serves what ``nm_linear`` lets it: 2:4, never 4:8 or 8:16; here for any token count.
Every sparse projection is given a selection of its own, though q and k may share one. What a
correction or a dense prefix adds is left out.
"""

from __future__ import annotations

from sympy import Expr

from amber_compile.report import Site

from .kernel import Kernels, T, ratio
from .rates import Rates
from .work import Work


def dense_work(site: Site, kernels: Kernels) -> Work:
    """Return what a projection costs without sparsity; one that is never called, nothing."""
    return Work(((kernels.matmul(_rows(site), site.shape), 1),) if site.macs else ())


def sparse_work(site: Site, kernels: Kernels) -> Work:
    """Return what a projection costs as it was decided."""
    settings, share = site.decision.settings, ratio(site.share)
    if settings is None or not site.macs or not share:
        return dense_work(site, kernels)
    *experts, n, k = site.shape
    part, rows = (*experts, share * n, k), _rows(site)
    if why_masked(site, kernels.rates, kernels.dtype) is None:
        made = [kernels.compress(rows, k), kernels.sparse_matmul(rows, part)]
    else:
        made = [kernels.select(rows, k), kernels.matmul(rows, part)]
    if share != 1:
        made.append(kernels.matmul(rows, (*experts, (1 - share) * n, k)))
    return Work(tuple((kernel, 1) for kernel in made))


def why_masked(site: Site, rates: Rates, dtype: str) -> str | None:
    """Return why no sparse unit multiplies a sparse site on a machine, or None if one does.

    The rules of ``nm_linear``, as far as a report has what they ask for.
    """
    settings = site.decision.settings
    if settings is None:
        return "it is dense"
    *experts, n, k = site.shape
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
