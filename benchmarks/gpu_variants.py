"""The ways to multiply that are compared: dense, cuSPARSELt, and ours.

    variants(device)            those that need nothing but their inputs
    cusparselt(inputs)          those whose algorithm is searched for, per shape and token count

A stage says what is in the time. ``multiply``: operands are ready. ``compress+multiply``: all that
2:4 adds. ``quantize+multiply``: codes and scales of a dense activation, by Inductor, then the dense
product; the scaling of its int32 outputs is left out, in favour of dense int8.
Ours named ``W8A8`` is the operator without a selection, scales and rounding included.
``select+compress+multiply``: cuSPARSELt compresses only what is zero already, so ``nm_select``
comes first; its ``compress+multiply`` is for an activation that came selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from gpu_operands import KINDS, LIMITS, Inputs, amber, quantize_rows
from torch import Tensor

from amber_compile.kernels.nm_linear import why_masked
from amber_compile.kernels.nm_matmul import why_reference

DENSE, CUSPARSELT, AMBER = "dense", "cuSPARSELt", "amber"
MULTIPLY, COMPRESS = "multiply", "compress+multiply"
SELECT, QUANTIZE = "select+compress+multiply", "quantize+multiply"
NM_LINEAR, NM_QUANTIZED, W8A8 = "nm_linear", "nm_quantized_linear", "W8A8"
CHOOSING = (NM_LINEAR, NM_QUANTIZED)
"""The notes of the variants that may choose not to be sparse."""
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """One way to multiply.

    ``selected`` and ``scaled`` say what its result is: of the 2:4 activation or of all of it, and
    with the scales of tokens and outputs or of codes alone.
    """

    library: str
    kind: str
    stage: str
    run: Callable[[Inputs], Tensor]
    note: str = ""
    selected: bool = True
    scaled: bool = True

    @property
    def name(self) -> str:
        """How tables name it."""
        return " ".join(filter(None, (self.library, self.kind, self.stage, self.note)))


def variants(device: torch.device) -> list[Variant]:
    """Return the dense variants, the likely best first, then ours."""
    return [*_dense(device), *_amber()]


# ---- dense ---------------------------------------------------------------------------------------


def _mm(inputs: Inputs) -> Tensor:
    return torch.mm(inputs.x, inputs.weights.dense.t())


def _mm_transposed(inputs: Inputs) -> Tensor:
    return torch.mm(inputs.x, inputs.weights.transposed)


def _mm_cublaslt(inputs: Inputs) -> Tensor:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        return _mm(inputs)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _int_mm(inputs: Inputs) -> Tensor:
    return torch._int_mm(inputs.dense_int8[0], inputs.weights.int8[0].t())


def _scaled_mm(inputs: Inputs) -> Tensor:
    return scaled_mm(*inputs.dense_fp8, *inputs.weights.fp8)


def scaled_mm(x: Tensor, rows: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Multiply e4m3 codes [T, K] by [N, K], with a scale a row: the dense fp8 product."""
    return torch._scaled_mm(
        x, weight.t(), rows[:, None], columns[None, :], out_dtype=BF16, use_fast_accum=True
    )


@cache
def quantizer(compiled: bool) -> Callable[[Tensor, str], tuple[Tensor, Tensor]]:
    """Return ``quantize_rows``, as Inductor compiles it: a kernel that reads the input twice."""
    return torch.compile(quantize_rows, dynamic=True) if compiled else quantize_rows


def _quantized_int_mm(inputs: Inputs, compiled: bool) -> Tensor:
    codes, _ = quantizer(compiled)(inputs.x, "int8")
    return torch._int_mm(codes, inputs.weights.int8[0].t())


def _quantized_scaled_mm(inputs: Inputs, compiled: bool) -> Tensor:
    return scaled_mm(*quantizer(compiled)(inputs.x, "fp8"), *inputs.weights.fp8)


def _dense(device: torch.device) -> Iterator[Variant]:
    whole = partial(Variant, DENSE, selected=False)
    gpu = device.type == "cuda"
    yield whole("bf16", MULTIPLY, _mm)
    if gpu:
        yield whole("bf16", MULTIPLY, _mm_cublaslt, "cublasLt")
    yield whole("bf16", MULTIPLY, _mm_transposed, "[K, N]")
    yield whole("int8", MULTIPLY, _int_mm, scaled=False)
    yield whole("int8", QUANTIZE, partial(_quantized_int_mm, compiled=gpu), scaled=False)
    yield whole("fp8", MULTIPLY, _scaled_mm)
    yield whole("fp8", QUANTIZE, partial(_quantized_scaled_mm, compiled=gpu))


# ---- ours ----------------------------------------------------------------------------------------


def _multiply(inputs: Inputs, kind: str) -> Tensor:
    return inputs.multiply(kind, inputs.compressed(kind))


def _compress_multiply(inputs: Inputs, kind: str) -> Tensor:
    return inputs.multiply(kind, inputs.compress(kind))


def _nm_linear(inputs: Inputs) -> Tensor:
    weights = inputs.weights
    y: Tensor = amber.nm_linear(inputs.x, weights.dense, None, weights.factor, 2, 4)
    return y


def _nm_quantized_linear(inputs: Inputs, kind: str, n: int) -> Tensor:
    codes, scale = inputs.weights.operand(kind)
    y: Tensor = amber.nm_quantized_linear(
        inputs.x, inputs.weights.factor, None, codes, scale, None, n, 4, kind
    )
    return y


def _amber() -> Iterator[Variant]:
    for kind in KINDS:
        yield Variant(AMBER, kind, MULTIPLY, partial(_multiply, kind=kind))
        yield Variant(AMBER, kind, COMPRESS, partial(_compress_multiply, kind=kind))
    yield Variant(AMBER, "bf16", COMPRESS, _nm_linear, NM_LINEAR)
    for kind in LIMITS:
        run = partial(_nm_quantized_linear, kind=kind)
        yield Variant(AMBER, kind, COMPRESS, partial(run, n=2), NM_QUANTIZED)
        yield Variant(AMBER, kind, QUANTIZE, partial(run, n=4), W8A8, selected=False)


def why_not_sparse(variant: Variant, inputs: Inputs) -> str | None:
    """Return why a variant of ours runs something else than a sparse kernel, or None."""
    x, (weight, _) = inputs.x, inputs.weights.operand(variant.kind)
    if x.device.type != "cuda":
        return "there is no sparse kernel for a CPU"
    if variant.note in CHOOSING:
        from amber_compile.kernels.cuda.crossover import crossover

        least = crossover(variant.kind, *weight.shape)
        few = f"the table asks for {least} tokens" if x.shape[0] < least else None
        return why_masked(x, weight, 2, 4, None) or few
    values, metadata, _ = inputs.compressed(variant.kind)
    return why_reference(values, metadata, weight)


# ---- cuSPARSELt ----------------------------------------------------------------------------------


def cusparselt(inputs: Inputs, kinds: Sequence[str] = KINDS) -> Iterator[Variant]:
    """Search an algorithm for each kind and yield its variants, beside the default's product.

    Its 8-bit operands are codes of ours, so ``kinds`` are those of ours that may run.
    """
    for kind in kinds:
        try:
            searched = _search(inputs, kind)
        except RuntimeError:  # a kind that this cuSPARSELt lacks: its variants say why
            searched = 0
        for algorithm in sorted({0, searched}):
            yield from _with_algorithm(kind, algorithm, algorithm == searched)


def _search(inputs: Inputs, kind: str) -> int:
    weight, _ = inputs.weights.operand(kind)
    compressed = torch._cslt_compress(inputs.selected_dense(kind))
    return int(torch._cslt_sparse_mm_search(compressed, weight.t(), out_dtype=_out_dtype(kind)))


def _with_algorithm(kind: str, algorithm: int, whole: bool) -> Iterator[Variant]:
    """Yield the product by an algorithm, and if it is the one to use, with what precedes it."""

    def product(inputs: Inputs, compressed: Tensor) -> Tensor:
        weight, _ = inputs.weights.operand(kind)
        return torch._cslt_sparse_mm(
            compressed, weight.t(), out_dtype=_out_dtype(kind), alg_id=algorithm
        )

    def multiply(inputs: Inputs) -> Tensor:
        return product(inputs, inputs.cslt_compressed(kind))

    def compress(inputs: Inputs) -> Tensor:
        return product(inputs, torch._cslt_compress(inputs.selected_dense(kind)))

    def select(inputs: Inputs) -> Tensor:
        kept = amber.nm_select(inputs.x, inputs.weights.factor, 2, 4)
        return product(inputs, torch._cslt_compress(kept))

    of = partial(Variant, CUSPARSELT, kind, note=f"algorithm {algorithm}", scaled=False)
    yield of(MULTIPLY, multiply)
    if whole:
        yield of(COMPRESS, compress)
    if whole and kind == "bf16":
        yield of(SELECT, select)


def _out_dtype(kind: str) -> torch.dtype | None:
    return None if kind == "bf16" else BF16
