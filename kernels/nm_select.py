"""Keep the N best of every M consecutive channels of each token.

    key  = |x · factor| in fp32                  y = x where rank(key) < n, +0 elsewhere
    y    = round(y · scale)                      scale = 1 without a correction

Of two channels of a group the larger key is better: NaN above infinity above finite, all NaN
alike, -0 = +0. Of two equal keys the lower channel is better. So the answer is unique, and what is
kept is kept bit for bit. For float64 "fp32" reads "float64" throughout.

    correction        scale, per token
    norm              sqrt((mean x² + ε) / (mean y² + ε))     over all channels, zeros included
    variance          sqrt((Var x + ε) / (Var y + ε))         the same about the means

ε = 1e-30 lies far below the energy of any activation and far above the denormals; it stands above
the line too, so that a vanishing token gets scale 1 (and zeros stay zeros) rather than scale 0. A
token whose scale is not finite (it has an infinity, a NaN, or squares that overflow) gets scale 1.

With ``offsets`` the rows of ``x`` are grouped by expert: those of expert e end before row
``offsets[e]`` and have the factor's row e. Rows behind the last end count with the last expert.

Copied unchanged: the first ``dense_prefix`` positions of a sequence (dimension -2), and all of
``x`` when it has fewer than ``min_tokens`` tokens. The latter is decided here, at run time, because
a symbolic token count can then stay free of guards.
"""

from __future__ import annotations

import ctypes

import torch

from amber_compile.kernels.arguments import check_selection
from amber_compile.kernels.cpu_library import cpu_library, openmp_parallel
from amber_compile.kernels.cuda.device import why_no_triton
from amber_compile.kernels.registration import LIBRARY, define

EPSILON = 1e-30

# ---- reference -----------------------------------------------------------------------------------


def nm_select_reference(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select in plain tensor operations, on any device: the definition of the operator."""
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens, offsets)
    if tokens(x) < min_tokens:
        return x.clone(memory_format=torch.contiguous_format)
    if factor is not None and offsets is not None:
        factor = factor[_expert_of_rows(x, offsets)]
    kept = torch.where(selected(x, factor, n, m), x, 0).contiguous()
    if correction is not None:
        kept = (kept.to(_precision(x)) * correction_scale(x, kept, correction)).to(x.dtype)
    if dense_prefix and x.dim() == 1:
        kept.copy_(x)
    elif dense_prefix:
        kept[..., :dense_prefix, :] = x[..., :dense_prefix, :]
    return kept


def tokens(x: torch.Tensor) -> int:
    """Return the number of tokens of ``x`` [..., channels]."""
    return x.shape[:-1].numel()


def _expert_of_rows(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the expert [rows] whose rows end after each row; the last one beyond all ends."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True).clamp_(max=offsets.shape[0] - 1)


def _precision(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def selected(x: torch.Tensor, factor: torch.Tensor | None, n: int, m: int) -> torch.Tensor:
    """Mark the channels of ``x`` [..., channels] that are kept."""
    return _best(_keys(x, factor), n, m)


def _keys(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return integers that order like the scores: their bits, every NaN being the largest."""
    scores = x.to(_precision(x))
    if factor is not None:
        scores = scores * factor
    scores = scores.abs()
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    return scores.view(integer).masked_fill(scores.isnan(), torch.iinfo(integer).max)


def _best(keys: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mark the ``n`` largest of every ``m`` keys; a stable sort prefers the lower channel."""
    groups = keys.view(*keys.shape[:-1], keys.shape[-1] // m, m)
    places = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True).flatten(-2)


def correction_scale(x: torch.Tensor, kept: torch.Tensor, correction: str) -> torch.Tensor:
    """Return the factor [..., 1] that gives the kept values the energy of ``x``."""
    before, after = (_energy(value.to(_precision(x)), correction) for value in (x, kept))
    scale = ((before + EPSILON) / (after + EPSILON)).sqrt()
    return scale.where(scale.isfinite(), 1)


def _energy(x: torch.Tensor, correction: str) -> torch.Tensor:
    if correction == "variance":
        x = x - x.mean(-1, keepdim=True)
    return x.square().mean(-1, keepdim=True)


# ---- kernel --------------------------------------------------------------------------------------
#
# cpu/nm_select.cpp answers bit for bit like the reference, or within rounding if it corrects. It
# never flushes denormals, whatever torch.set_flush_denormal says. CUDA tensors have the Triton
# kernels of cuda/nm_select.py. float64 has the reference only.

ENTRIES = {
    torch.float32: "nm_select_float32",
    torch.bfloat16: "nm_select_bfloat16",
    torch.float16: "nm_select_float16",
}
CODES = {None: 0, "norm": 1, "variance": 2}
SINGLE_THREADED = 1 << 16  # elements; with fewer, threads cost more than they bring


class Tokens(ctypes.Structure):
    """``struct Tokens`` of cpu/tokens.h, line by line: what is selected from, and how."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "factor", "ends")),
        *((name, ctypes.c_int64) for name in ("tokens", "channels", "x_stride")),
        *((name, ctypes.c_int64) for name in ("sequence", "dense", "experts")),
        *((name, ctypes.c_int32) for name in ("n", "m", "correction", "threads")),
    )


# ---- launch --------------------------------------------------------------------------------------


def launch(
    library: ctypes.CDLL,
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the C++ kernel on ``x`` [..., channels], not empty and of a type in ``ENTRIES``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    asked, _alive = tokens_of(x, factor, n, m, correction, dense_prefix, offsets)
    getattr(library, ENTRIES[x.dtype])(
        ctypes.byref(asked), ctypes.c_void_p(y.data_ptr()), openmp_parallel()
    )
    return y


def tokens_of(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None,
    dense_prefix: int,
    offsets: torch.Tensor | None,
) -> tuple[Tokens, tuple[torch.Tensor | None, ...]]:
    """Return what a C++ kernel is asked, and the tensors that must live until it has answered."""
    rows = _rows(x)
    factor = None if factor is None else factor.contiguous()
    ends = None if offsets is None else offsets.contiguous()
    threads = 1 if x.numel() < SINGLE_THREADED else torch.get_num_threads()
    asked = Tokens(
        *(rows.data_ptr(), address(factor), address(ends)),
        *(*rows.shape, rows.stride(0)),
        *(1 if x.dim() == 1 else x.shape[-2], dense_prefix, 1 if ends is None else len(ends)),
        *(n, m, CODES[correction], threads),
    )
    return asked, (rows, factor, ends)


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as [tokens, channels], channels side by side: a view if its strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _nm_select_cpu(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens, offsets)
    if n == m or tokens(x) < min_tokens or not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    library = cpu_library() if x.dtype in ENTRIES else None
    if library is None:
        return nm_select_reference(x, factor, n, m, correction, dense_prefix, 0, offsets)
    return launch(library, x, factor, n, m, correction, dense_prefix, offsets)


def _nm_select_cuda(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens, offsets)
    if n == m or tokens(x) < min_tokens or not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    if kernel_for(x) == "reference":
        return nm_select_reference(x, factor, n, m, correction, dense_prefix, 0, offsets)
    from amber_compile.kernels.cuda.nm_select import launch  # needs Triton

    with torch.cuda.device(x.device):
        return launch(x, factor, n, m, correction, dense_prefix, offsets)


def kernel_for(x: torch.Tensor) -> str:
    """Name what selects from tensors like ``x``, for a report: C++, Triton or reference."""
    if x.dtype in ENTRIES:  # the Triton kernels have the same
        if x.device.type == "cpu" and cpu_library() is not None:
            return "C++"
        if x.device.type == "cuda" and why_no_triton() is None:
            return "Triton"
    return "reference"


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens, offsets)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


nm_select = define(
    "nm_select(Tensor x, Tensor? factor, int n, int m, str? correction=None, "
    "int dense_prefix=0, int min_tokens=0, Tensor? offsets=None) -> Tensor",
    nm_select_reference,
    _fake,
)

LIBRARY.impl("nm_select", _nm_select_cpu, "CPU")
LIBRARY.impl("nm_select", _nm_select_cuda, "CUDA")
