"""Apply a projection to the N best of every M input channels.

    y = linear(nm_select(x, factor, n, m, …), weight, bias)
    y = round(y · output_scale + output_bias)          if either is given: fp32 [N], of calibration

One operator for the whole projection: a device with a sparse matrix unit takes it over whole,
compressing what it selects. Elsewhere the selection is followed by the dense product. Every row is
scaled and shifted, those that ``dense_prefix`` and ``min_tokens`` leave dense among them.

On CUDA the sparse unit multiplies if it takes the pattern, the types and the sizes, and if the call
has as many tokens as a static table asks for (cuda/crossover.py). Nothing is timed at run time, so
one call always answers like the next. The two ways round differently:

    masked    the corrected activation, the product with its bias, and the second line: each to the
              activation's own type; the second line is fp32 in between (fp64 for fp64)
    sparse    once: product · correction · output_scale + (bias · output_scale + output_bias), fp32
"""

from __future__ import annotations

import torch

from amber_compile.kernels.arguments import check_outputs, check_projection, check_selection
from amber_compile.kernels.cuda.crossover import NEVER, crossover
from amber_compile.kernels.cuda.device import KINDS, device_instruction, why_no_sparse_product
from amber_compile.kernels.nm_compress import nm_compress
from amber_compile.kernels.nm_matmul import nm_matmul
from amber_compile.kernels.nm_select import nm_select, tokens
from amber_compile.kernels.registration import LIBRARY, define

ALIGNMENT = 16  # bytes: where the copy engine may start to read a weight

# ---- reference -----------------------------------------------------------------------------------


def nm_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    output_scale: torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select, then multiply: [..., K], [N, K] -> [..., N]."""
    kept = nm_select(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    check_outputs(weight, output_scale, output_bias)
    return _corrected(torch.nn.functional.linear(kept, weight, bias), output_scale, output_bias)


def _corrected(
    y: torch.Tensor, output_scale: torch.Tensor | None, output_bias: torch.Tensor | None
) -> torch.Tensor:
    """Return ``y`` scaled and shifted, rounded to its type."""
    corrected = y
    if output_scale is not None:
        corrected = corrected * output_scale  # fp32, or fp64 where y is
    if output_bias is not None:
        corrected = corrected + output_bias
    return corrected.to(y.dtype)


# ---- launch --------------------------------------------------------------------------------------


def why_masked(
    x: torch.Tensor, weight: torch.Tensor, n: int, m: int, correction: str | None
) -> str | None:
    """Return why no sparse matrix unit serves a projection, or None if one does.

    ``weight`` [N, K] is of the type of ``x``, or holds the codes of a quantised projection. Looks
    at what a graph knows of its tensors: fake ones do. The reason is for the report.
    """
    if x.device.type != "cuda":
        return f"no sparse unit on device {x.device.type!r}"
    if (n, m) != (2, 4):
        return f"{n}:{m} has no sparse unit"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype} has no sparse unit"
    if correction == "variance":
        return "the variance correction shifts what a sparse unit would only scale"
    outputs, channels = weight.shape
    if channels % 64:
        return f"K = {channels} is not a multiple of 64"
    if outputs % 8:
        return f"N = {outputs} is not a multiple of 8"
    if not weight.is_contiguous():
        return "its weight is not contiguous"
    if reason := why_no_sparse_product(x.device, KINDS[weight.dtype]):
        return reason
    if _crossover(x, weight) is None:
        return f"[{outputs}, {channels}] is too small for a sparse product to pay"
    return None


def kernel_of(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Name what runs a projection that a sparse unit serves, and from how many tokens."""
    instruction = device_instruction(x.device)
    assert instruction is not None, "why_masked has found one"
    operator = "nm_linear" if weight.dtype == x.dtype else "nm_quantized_linear"
    return f"{operator}, {instruction.name} from {_crossover(x, weight)} tokens"


def is_sparse(
    x: torch.Tensor, weight: torch.Tensor, n: int, m: int, correction: str | None, least: int
) -> bool:
    """Return whether a sparse unit multiplies this call, which must have ``least`` tokens too."""
    if weight.data_ptr() % ALIGNMENT or why_masked(x, weight, n, m, correction):
        return False
    return tokens(x) >= max(least, _crossover(x, weight) or 0)


def _crossover(x: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Return from how many tokens on a sparse product is used; None: never."""
    least = crossover(KINDS[weight.dtype], *weight.shape)
    return None if least >= NEVER else least


def _nm_linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    output_scale: torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    check_outputs(weight, output_scale, output_bias)
    if not is_sparse(x, weight, n, m, correction, min_tokens):
        kept = nm_select(x, factor, n, m, correction, dense_prefix, min_tokens)
        y = torch.nn.functional.linear(kept, weight, bias)
        return _corrected(y, output_scale, output_bias)
    values, metadata, scale = nm_compress(x, factor, None, correction)
    shift = _whole_bias(bias, output_scale, output_bias)
    y = nm_matmul(values, metadata, weight, shift, scale if correction else None, output_scale)
    y = y.view(*x.shape[:-1], weight.shape[0])
    if dense_prefix:
        first = torch.nn.functional.linear(x[..., :dense_prefix, :], weight, bias)
        y[..., :dense_prefix, :] = _corrected(first, output_scale, output_bias)
    return y


def _whole_bias(
    bias: torch.Tensor | None, output_scale: torch.Tensor | None, output_bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return what is added to a scaled product: bias · output_scale + output_bias."""
    if bias is not None and output_scale is not None:
        bias = bias * output_scale
    return output_bias if bias is None else bias if output_bias is None else bias + output_bias


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    output_scale: torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    check_outputs(weight, output_scale, output_bias)
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


nm_linear = define(
    "nm_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? factor, int n, int m, "
    "str? correction=None, int dense_prefix=0, int min_tokens=0, Tensor? output_scale=None, "
    "Tensor? output_bias=None) -> Tensor",
    nm_linear_reference,
    _fake,
)

LIBRARY.impl("nm_linear", _nm_linear_cuda, "CUDA")
