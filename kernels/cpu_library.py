"""The C++ kernels of the CPU: compiled at their first use, kept on disk, loaded.

Every source in ``cpu/`` goes into one library with a plain C interface, without PyTorch's headers,
so that compiling takes seconds. It is made for this very CPU and kept in the user's cache folder
(``$XDG_CACHE_HOME``); compilation.py says how.

Where there is no compiler, or it fails, the references run instead, and one warning gives the
cause. ``AMBER_CPU_KERNEL=cpp`` makes that an error; ``AMBER_CPU_KERNEL=reference`` asks for it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from amber_compile.errors import OptionError, choices
from amber_compile.kernels.compilation import (
    BuildError,
    Recipe,
    build,
    cache_folder,
    find_compiler,
    version,
)

SOURCES = Path(__file__).with_name("cpu")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-exceptions", "-Wl,--as-needed"),
    "-ffp-contract=off",  # a fused multiply-add would round once where the reference rounds twice
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),  # loops that vectorise
)


@dataclass(frozen=True)
class Kernels:
    """The loaded library, or None where the references run; and the reason, for people."""

    library: ctypes.CDLL | None
    why: str


_loaded: dict[str, Kernels] = {}  # by what AMBER_CPU_KERNEL wanted
_loading = threading.Lock()
os.register_at_fork(  # a child must not wait for a thread that it does not have
    before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
)


def cpu_library() -> ctypes.CDLL | None:
    """Return the library of C++ kernels, building it if need be; None: use the reference."""
    return _kernels().library


def cpu_kernel() -> str:
    """Say which kernels run on the CPU: "C++, compiled by …" or "reference: …" with the cause."""
    return _kernels().why


@functools.cache
def openmp_parallel() -> ctypes.c_void_p:
    """Return the address of ``GOMP_parallel`` in the OpenMP runtime that PyTorch itself uses.

    Null if it uses none, or one without this entry: then the kernels stay on one thread.
    """
    entry = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", 0)
    return ctypes.cast(entry, ctypes.c_void_p)


def _kernels() -> Kernels:
    wanted = os.environ.get("AMBER_CPU_KERNEL", "")
    if wanted not in _loaded:
        with _loading:  # one build and one warning, whatever the number of threads
            if wanted not in _loaded:
                _loaded[wanted] = _load(wanted)
    return _loaded[wanted]


def _load(wanted: str) -> Kernels:
    if wanted not in ("", "cpp", "reference"):
        raise OptionError(choices("AMBER_CPU_KERNEL", wanted, ("cpp", "reference")))
    if wanted == "reference":
        return Kernels(None, "reference: AMBER_CPU_KERNEL=reference")
    try:
        compiler = find_compiler()
        return Kernels(_build_and_load(compiler), f"C++, compiled by {version(compiler)}")
    except BuildError as error:
        if wanted == "cpp":
            raise
        warnings.warn(f"Amber runs its slow reference kernels on the CPU: {error}", stacklevel=2)
        return Kernels(None, f"reference: {error}")


def recipe() -> Recipe:
    """Return what the library is made of."""
    return Recipe("cpu", (SOURCES,), FLAGS)


def _build_and_load(compiler: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library from the cache folder or, if that is of no use, a passing one."""
    try:
        return ctypes.CDLL(str(build(recipe(), compiler, cache_folder())))
    except OSError:  # read-only, full, or mounted such that nothing in it may run
        with tempfile.TemporaryDirectory(prefix="amber-") as passing:
            return ctypes.CDLL(str(build(recipe(), compiler, Path(passing))))
