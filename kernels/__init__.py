"""The operators: importing this package registers them under ``torch.ops.amber``.

| operator      | meaning                                                             |
|---------------|---------------------------------------------------------------------|
| `nm_select`   | keep the N best of every M channels of a token                      |
| `nm_linear`   | a projection of what `nm_select` keeps                              |
| `nm_compress` | keep 2:4 in compressed form, quantised to 8 bits if asked           |
| `nm_matmul`   | multiply compressed rows with a weight                              |

Every operator has one eager reference, which defines it on every device. A kernel may replace the
reference, never change its answer. On a CPU that kernel is C++, compiled at its first use (cpu/),
on a GPU it is written in Triton or Gluon (cuda/).
"""

from amber_compile.kernels.cpu_library import cpu_kernel
from amber_compile.kernels.nm_compress import nm_compress
from amber_compile.kernels.nm_linear import nm_linear
from amber_compile.kernels.nm_matmul import nm_matmul
from amber_compile.kernels.nm_select import nm_select

__all__ = ["cpu_kernel", "nm_compress", "nm_linear", "nm_matmul", "nm_select"]
