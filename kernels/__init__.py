"""The operators: importing this package registers them under ``torch.ops.amber``.

| operator    | meaning                                        |
|-------------|------------------------------------------------|
| `nm_select` | keep the N best of every M channels of a token |
| `nm_linear` | a projection of what `nm_select` keeps         |

Every operator has one eager reference, which defines it on every device. A kernel may replace the
reference, never change its answer. On a CPU that kernel is C++, compiled at its first use.
"""

from amber_compile.kernels.cpu_library import cpu_kernel
from amber_compile.kernels.nm_linear import nm_linear
from amber_compile.kernels.nm_select import nm_select

__all__ = ["cpu_kernel", "nm_linear", "nm_select"]
