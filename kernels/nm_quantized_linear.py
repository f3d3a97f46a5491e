"""Apply a quantised projection to the N best of every M input channels.

    codes, row_scale = nm_quantize(x, factor, smooth, n, m, dtype, …)
    y                = quantized_linear(codes, row_scale, weight, weight_scale, bias, out_dtype)

One operator for the whole projection, as nm_linear is for 16 bits. ``weight`` [N, K] holds codes of
``dtype``, not packed for a CPU, ``weight_scale`` [N] is fp32, ``bias`` of any floating type.
``out_dtype`` None is the type of ``x``. With n = m nothing is dropped: a plain W8A8 projection.

On CUDA a sparse matrix unit multiplies (nm_compress, nm_matmul) if it takes the pattern, the types
and the sizes, and if the call has as many tokens as a static table asks for (cuda/crossover.py);
else the two lines above run as they stand, as a dense product. Both apply all scales in fp32 behind
the product and round once. int8 codes, scales and sums are the same either way, without a
correction to the last bit; a correction sums its energies in another order. The first
``dense_prefix`` positions are always dense products, of all their channels.
"""

from __future__ import annotations

import torch

from amber_compile.errors import OptionError
from amber_compile.kernels.arguments import differ
from amber_compile.kernels.codes import CODES
from amber_compile.kernels.nm_compress import nm_compress
from amber_compile.kernels.nm_linear import is_sparse
from amber_compile.kernels.nm_matmul import RESULTS, nm_matmul
from amber_compile.kernels.nm_quantize import check_quantization, nm_quantize
from amber_compile.kernels.prepared_weight import prepare_weight
from amber_compile.kernels.quantize_rows import quantize_rows
from amber_compile.kernels.quantized_linear import quantized_linear
from amber_compile.kernels.registration import LIBRARY, define

# ---- reference -----------------------------------------------------------------------------------


def nm_quantized_linear_reference(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str = "int8",
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Quantise what is selected, then multiply: [..., K], [N, K] -> [..., N]."""
    selection = (n, m, dtype, correction, dense_prefix, min_tokens)
    check_quantization(x, factor, smooth, *selection)
    check_weight(x, weight, weight_scale, bias, dtype, out_dtype)
    codes, scale = nm_quantize(x, factor, smooth, *selection)
    prepared = prepare_weight(weight)
    return quantized_linear(codes, scale, prepared, weight_scale, bias, out_dtype or x.dtype)


# ---- launch --------------------------------------------------------------------------------------


def _nm_quantized_linear_cuda(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str = "int8",
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    selection = (n, m, dtype, correction, dense_prefix, min_tokens)
    check_quantization(x, factor, smooth, *selection)
    check_weight(x, weight, weight_scale, bias, dtype, out_dtype)
    product = (weight, weight_scale, bias, out_dtype or x.dtype)
    if not is_sparse(x, weight, n, m, correction, min_tokens):
        return quantized_linear(*nm_quantize(x, factor, smooth, *selection), *product)
    values, metadata, scale = nm_compress(x, factor, dtype, correction, smooth)
    shift = None if bias is None else bias.float()
    y = nm_matmul(values, metadata, weight, shift, scale, weight_scale, product[-1])
    y = y.view(*x.shape[:-1], weight.shape[0])
    if dense_prefix:
        first = quantize_rows(x[..., :dense_prefix, :], smooth, dtype)
        y[..., :dense_prefix, :] = quantized_linear(*first, *product)
    return y


# ---- operator ------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    smooth: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    m: int,
    dtype: str = "int8",
    correction: str | None = None,
    dense_prefix: int = 0,
    min_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    check_quantization(x, factor, smooth, n, m, dtype, correction, dense_prefix, min_tokens)
    check_weight(x, weight, weight_scale, bias, dtype, out_dtype)
    return x.new_empty([*x.shape[:-1], weight.shape[0]], dtype=out_dtype)


def check_weight(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: str,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ``OptionError`` unless a quantised ``x`` can be multiplied like that.

    As in arguments.py a rule about a symbolic size is left to run time.
    """
    result = out_dtype or x.dtype
    if result not in RESULTS:
        raise OptionError(f"out_dtype={result}; valid: {', '.join(map(str, RESULTS))}")
    wrong = weight.dim() != 2 or differ(weight.shape[1], x.shape[-1])
    if wrong or weight.dtype != CODES[dtype]:
        raise OptionError(
            f"weight is {weight.dtype} {list(weight.shape)}; valid: {CODES[dtype]} "
            f"[N, {x.shape[-1]}]"
        )
    if weight_scale.dtype != torch.float32:
        raise OptionError(f"weight_scale has dtype {weight_scale.dtype}; valid: torch.float32")
    if bias is not None and not bias.is_floating_point():
        raise OptionError(f"bias has dtype {bias.dtype}; valid: a floating one")
    for name, tensor in (("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
        if tensor is None:
            continue
        if tensor is not weight and (tensor.dim() != 1 or differ(tensor.shape[0], weight.shape[0])):
            raise OptionError(
                f"{name} has shape {list(tensor.shape)}; valid: [{weight.shape[0]}], as weight"
            )
        if tensor.device != x.device:
            raise OptionError(f"{name} is on {tensor.device}; valid: the device of x, {x.device}")


nm_quantized_linear = define(
    "nm_quantized_linear(Tensor x, Tensor? factor, Tensor? smooth, Tensor weight, "
    "Tensor weight_scale, Tensor? bias, int n, int m, str dtype='int8', str? correction=None, "
    "int dense_prefix=0, int min_tokens=0, ScalarType? out_dtype=None) -> Tensor",
    nm_quantized_linear_reference,
    _fake,
)

LIBRARY.impl("nm_quantized_linear", _nm_quantized_linear_cuda, "CUDA")
