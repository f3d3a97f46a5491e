"""Apply a projection to the N best of every M input channels.

    y = linear(nm_select(x, factor, n, m, …), weight, bias)

One operator for the whole projection: a device with a sparse matrix unit takes it over whole,
compressing what it selects. Elsewhere the selection is followed by the dense product.

On CUDA the sparse unit multiplies if it takes the pattern, the types and the sizes, and if the call
has as many tokens as a static table asks for (cuda/crossover.py). Nothing is timed at run time, so
one call always answers like the next. The two ways round differently: the sparse one corrects a
token in fp32 behind the product, the masked one before it, in the activation's own type.
"""

from __future__ import annotations

import torch

from amber_compile.kernels.arguments import check_projection, check_selection
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
) -> torch.Tensor:
    """Select, then multiply: [..., K], [N, K] -> [..., N]."""
    kept = nm_select(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    return torch.nn.functional.linear(kept, weight, bias)


# ---- launch --------------------------------------------------------------------------------------


def why_masked(
    x: torch.Tensor, weight: torch.Tensor, n: int, m: int, correction: str | None
) -> str | None:
    """Return why no sparse matrix unit serves a projection, or None if one does.

    Looks at what a graph knows of its tensors: fake ones do. The reason is for the report.
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
    if reason := why_no_sparse_product(x.device, KINDS[x.dtype]):
        return reason
    if _crossover(x, weight) is None:
        return f"[{outputs}, {channels}] is too small for a sparse product to pay"
    return None


def kernel_of(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Name what runs a projection that a sparse unit serves, and from how many tokens."""
    instruction = device_instruction(x.device)
    assert instruction is not None, "why_masked has found one"
    return f"nm_linear, {instruction.name} from {_crossover(x, weight)} tokens"


def _crossover(x: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Return from how many tokens on a sparse product is used; None: never."""
    least = crossover(KINDS[x.dtype], *weight.shape)
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
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    masked = weight.data_ptr() % ALIGNMENT or why_masked(x, weight, n, m, correction)
    if masked or tokens(x) < max(min_tokens, _crossover(x, weight) or 0):
        kept = nm_select(x, factor, n, m, correction, dense_prefix, min_tokens)
        return torch.nn.functional.linear(kept, weight, bias)
    values, metadata, scale = nm_compress(x, factor, None, correction)
    y = nm_matmul(values, metadata, weight, bias, scale if correction else None)
    y = y.view(*x.shape[:-1], weight.shape[0])
    if dense_prefix:
        y[..., :dense_prefix, :] = torch.nn.functional.linear(
            x[..., :dense_prefix, :], weight, bias
        )
    return y


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
) -> torch.Tensor:
    check_selection(x, factor, n, m, correction, dense_prefix, min_tokens)
    check_projection(x, weight, bias)
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


nm_linear = define(
    "nm_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? factor, int n, int m, "
    "str? correction=None, int dense_prefix=0, int min_tokens=0) -> Tensor",
    nm_linear_reference,
    _fake,
)

LIBRARY.impl("nm_linear", _nm_linear_cuda, "CUDA")
