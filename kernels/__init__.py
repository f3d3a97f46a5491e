"""The operators: importing this package registers them under ``torch.ops.amber``.

| operator              | meaning                                                           |
|-----------------------|-------------------------------------------------------------------|
| `nm_select`           | keep the N best of every M channels of a token                    |
| `nm_select_sharded`   | the same of one process's channels, corrected by those of all     |
| `nm_linear`           | a projection of what `nm_select` keeps                            |
| `nm_compress`         | keep 2:4 in compressed form, quantised to 8 bits if asked         |
| `nm_matmul`           | multiply compressed rows with a weight                            |
| `quantize_rows`       | int8 or fp8 codes of each token, and its scale                    |
| `nm_quantize`         | the same of what `nm_select` keeps                                |
| `quantized_linear`    | multiply codes with the codes of a weight                         |
| `nm_quantized_linear` | a quantised projection of what `nm_select` keeps                  |

Every operator has one eager reference, which defines it on every device. A kernel may replace the
reference, never change its answer. On a CPU that kernel is C++, compiled at its first use (cpu/),
on a GPU it is written in Triton or Gluon (cuda/). cpu_operators/ registers those of a CPU where
there is no Amber (operator_library.py).
"""

from amber_compile.kernels.cpu_library import cpu_kernel
from amber_compile.kernels.nm_compress import nm_compress
from amber_compile.kernels.nm_linear import nm_linear
from amber_compile.kernels.nm_matmul import nm_matmul
from amber_compile.kernels.nm_quantize import nm_quantize
from amber_compile.kernels.nm_quantized_linear import nm_quantized_linear
from amber_compile.kernels.nm_select import nm_select
from amber_compile.kernels.nm_select_sharded import nm_select_sharded
from amber_compile.kernels.quantize_rows import quantize_rows
from amber_compile.kernels.quantized_linear import quantized_linear

__all__ = [
    "cpu_kernel",
    "nm_compress",
    "nm_linear",
    "nm_matmul",
    "nm_quantize",
    "nm_quantized_linear",
    "nm_select",
    "nm_select_sharded",
    "quantize_rows",
    "quantized_linear",
]
