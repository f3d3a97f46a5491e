"""What the operators accept, and the errors for what they do not.

Sizes may be symbolic while a graph is traced. A rule about such a size is left to run time, so
that no rule puts a guard on the graph.
"""

from __future__ import annotations

import torch

from amber_compile.errors import OptionError, choices
from amber_compile.kernels.codes import CODES
from amber_compile.pattern import Pattern
from amber_compile.settings import CORRECTIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_selection(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    n: int,
    m: int,
    correction: str | None,
    dense_prefix: int,
    min_tokens: int,
    offsets: torch.Tensor | None = None,
) -> None:
    """Raise ``OptionError`` unless N of every M channels of ``x`` can be selected."""
    Pattern(n, m)
    _check_rows(x)
    channels = x.shape[-1]
    if isinstance(channels, int) and channels % m:
        raise OptionError(f"x has {channels} channels; valid: a multiple of m={m}")
    if correction is not None and correction not in CORRECTIONS:
        raise OptionError(choices("correction", correction, CORRECTIONS))
    for name, value in (("dense_prefix", dense_prefix), ("min_tokens", min_tokens)):
        if isinstance(value, int) and value < 0:
            raise OptionError(f"{name}={value} is negative; valid: 0 and up")
    if factor is not None:
        _check_factor(factor, x, offsets)
    elif offsets is not None:
        raise OptionError("offsets tell the rows of each expert's factor; valid: None without one")


def _check_rows(x: torch.Tensor) -> None:
    if x.dim() == 0:
        raise OptionError("x is a scalar; valid: at least one dimension, the last one channels")
    if x.dtype not in DTYPES:
        raise OptionError(f"x has dtype {x.dtype}; valid: {', '.join(map(str, DTYPES))}")


def check_codes(x: torch.Tensor, smooth: torch.Tensor | None, dtype: str) -> None:
    """Raise ``OptionError`` unless the rows of ``x`` times ``smooth`` have codes."""
    _check_rows(x)
    if dtype not in CODES:
        raise OptionError(choices("dtype", dtype, CODES))
    if isinstance(x.shape[-1], int) and not x.shape[-1]:
        raise OptionError("x has 0 channels; valid: at least one")
    check_smooth(smooth, x)


def check_smooth(smooth: torch.Tensor | None, x: torch.Tensor) -> None:
    """Raise ``OptionError`` unless ``smooth`` is None or one number for each channel of ``x``."""
    if smooth is None:
        return
    if smooth.dtype != torch.float32:
        raise OptionError(f"smooth has dtype {smooth.dtype}; valid: torch.float32")
    if smooth.device != x.device:
        raise OptionError(f"smooth is on {smooth.device}; valid: the device of x, {x.device}")
    if smooth.dim() != 1 or differ(smooth.shape[0], x.shape[-1]):
        raise OptionError(f"smooth has shape {_shape(smooth)}; valid: [{x.shape[-1]}], as x")


def _check_factor(factor: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor | None) -> None:
    if factor.dtype != torch.float32:
        raise OptionError(f"factor has dtype {factor.dtype}; valid: torch.float32")
    if factor.device != x.device:
        raise OptionError(f"factor is on {factor.device}; valid: the device of x, {x.device}")
    if offsets is not None:
        _check_offsets(offsets, factor, x)
    elif factor.dim() != 1 or differ(factor.shape[0], x.shape[-1]):
        raise OptionError(f"factor has shape {_shape(factor)}; valid: [{x.shape[-1]}], as x")


def _check_offsets(offsets: torch.Tensor, factor: torch.Tensor, x: torch.Tensor) -> None:
    experts = factor.shape[0] if factor.dim() == 2 else None
    if experts is None or differ(factor.shape[1], x.shape[-1]):
        raise OptionError(
            f"factor has shape {_shape(factor)}; valid with offsets: [experts, {x.shape[-1]}]"
        )
    if x.dim() != 2:
        raise OptionError(f"x has shape {_shape(x)}; valid with offsets: [rows, channels]")
    if offsets.dtype != torch.int32 or offsets.dim() != 1 or differ(offsets.shape[0], experts):
        raise OptionError(
            f"offsets are {offsets.dtype} {_shape(offsets)}; valid: torch.int32 [{experts}]"
        )
    if offsets.device != x.device:
        raise OptionError(f"offsets are on {offsets.device}; valid: the device of x, {x.device}")


def check_projection(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ``OptionError`` unless ``linear(x, weight, bias)`` is defined."""
    if weight.dim() != 2 or differ(weight.shape[1], x.shape[-1]):
        raise OptionError(f"weight has shape {_shape(weight)}; valid: [outputs, {x.shape[-1]}]")
    if bias is not None and (bias.dim() != 1 or differ(bias.shape[0], weight.shape[0])):
        raise OptionError(f"bias has shape {_shape(bias)}; valid: [{weight.shape[0]}], as weight")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise OptionError(f"{name} has dtype {tensor.dtype}; valid: that of x, {x.dtype}")
        if tensor.device != x.device:
            raise OptionError(f"{name} is on {tensor.device}; valid: the device of x, {x.device}")


def check_outputs(
    weight: torch.Tensor, output_scale: torch.Tensor | None, output_bias: torch.Tensor | None
) -> None:
    """Raise ``OptionError`` unless both are None or one number for each output."""
    for name, vector in (("output_scale", output_scale), ("output_bias", output_bias)):
        if vector is None:
            continue
        if vector.dtype != torch.float32:
            raise OptionError(f"{name} has dtype {vector.dtype}; valid: torch.float32")
        if vector.dim() != 1 or differ(vector.shape[0], weight.shape[0]):
            raise OptionError(f"{name} has shape {_shape(vector)}; valid: [{weight.shape[0]}]")
        if vector.device != weight.device:
            raise OptionError(
                f"{name} is on {vector.device}; valid: the device of weight, {weight.device}"
            )


def differ(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Return whether two sizes are known to differ; a symbolic one is not known."""
    return isinstance(left, int) and isinstance(right, int) and left != right


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
