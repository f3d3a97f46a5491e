"""The operators as a shared library, for processes that have PyTorch and no Amber.

    torch.ops.load_library("libamber_ops.so")       Python, without amber_compile
    dlopen("libamber_ops.so", RTLD_NOW)             C++, with libtorch

registers the schemas and the CPU kernels of nm_select, nm_quantize, quantize_rows and
quantized_linear, all that a program rewritten for a CPU calls (cpu_operators/). The library holds
the kernels of cpu/, so its answers are Amber's own, bit for bit, if both are made for one CPU.
It is written against PyTorch's stable interface: made with one of the versions that Amber supports,
it serves all of them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from amber_compile.kernels import cpu_library
from amber_compile.kernels.compilation import (
    THIS_CPU,
    BuildError,
    Recipe,
    build,
    cache_folder,
    find_compiler,
)

FILE_NAME = "libamber_ops.so"
NATIVE = "native"
SOURCES = Path(__file__).with_name("cpu_operators")
STABLE_INTERFACE = "0x020b000000000000"  # of PyTorch 2.11, the oldest that Amber supports
TORCH = Path(torch.__file__).parent


def build_operator_library(path: str | os.PathLike[str] | None = None, march: str = NATIVE) -> Path:
    """Compile the library, unless that was done before; return where it is.

    Args:
        path: where to put it: a file, or a folder that gets ``libamber_ops.so``; None leaves it
            in the user's cache folder.
        march: the CPU it is made for, as ``-march=`` of the compiler has it. "native" is this one,
            as for the kernels of the backend; "x86-64-v3" runs on every x86 CPU with AVX2. With
            less than AVX-512 VNNI the int8 product is plain C++; corrections (``norm``,
            ``variance``) may round differently on another CPU, nothing else does.

    Raises:
        BuildError: if there is no compiler, or it fails, or there is no room for the library.
    """
    compiler, asked = find_compiler(), recipe(march)
    try:
        if path is None:
            return build(asked, compiler, cache_folder())
        return _put(asked, compiler, Path(path))
    except OSError as error:
        raise BuildError(f"the library cannot be written: {error}") from error


def recipe(march: str = NATIVE) -> Recipe:
    """Return what the library is made of."""
    flags = (
        *(*cpu_library.FLAGS, "-fexceptions", "-fvisibility=hidden"),
        *("-isystem", str(TORCH / "include"), f"-DTORCH_TARGET_VERSION={STABLE_INTERFACE}"),
    )
    return Recipe(
        name="operators",
        folders=(cpu_library.SOURCES, SOURCES),
        flags=(*flags, f"-DAMBER_TORCH={torch.__version__}"),  # other headers, another library
        targets=THIS_CPU if march == NATIVE else ((f"-march={march}",),),
        libraries=("-L", str(TORCH / "lib"), "-ltorch_cpu"),
    )


def _put(asked: Recipe, compiler: tuple[str, ...], path: Path) -> Path:
    """Build in the cache folder or, if that is of no use, beside ``path``; copy to ``path``."""
    path = path / FILE_NAME if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as own:
        try:
            made = build(asked, compiler, cache_folder())
        except OSError:
            made = build(asked, compiler, Path(own))
        os.replace(shutil.copy(made, Path(own, "copy.so")), path)
    return path
