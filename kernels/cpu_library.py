"""The C++ kernels of the CPU: compiled at their first use, kept on disk, loaded.

Every source in ``cpu/`` goes into one library with a plain C interface, without PyTorch's headers,
so that compiling takes seconds, all side by side. It is made for this very CPU and kept in the
user's cache folder (``$XDG_CACHE_HOME``), under a name that changes with the sources, the flags,
the compiler and the CPU. Processes may do so at once: each writes files of its own and renames one.

The compiler is ``$CXX`` or, as for Inductor, the first of g++, clang++ and c++. Where there is
none, or it fails, the references run instead, and one warning gives the cause.
``AMBER_CPU_KERNEL=cpp`` makes that an error; ``AMBER_CPU_KERNEL=reference`` asks for it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from amber_compile.errors import AmberError, OptionError, choices

SOURCES = Path(__file__).with_name("cpu")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-exceptions", "-Wl,--as-needed"),
    "-ffp-contract=off",  # a fused multiply-add would round once where the reference rounds twice
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),  # loops that vectorise
)
THIS_CPU = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes


class BuildError(AmberError, RuntimeError):
    """The C++ kernels could not be built; the message says why."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library, or None where the references run; and the reason, for people."""

    library: ctypes.CDLL | None
    why: str


_loaded: dict[str, Kernels] = {}  # by what AMBER_CPU_KERNEL wanted
_loading = threading.Lock()


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
        compiler = _find_compiler()
        return Kernels(_build_and_load(compiler), f"C++, compiled by {_version(compiler)}")
    except BuildError as error:
        if wanted == "cpp":
            raise
        warnings.warn(f"Amber runs its slow reference kernels on the CPU: {error}", stacklevel=2)
        return Kernels(None, f"reference: {error}")


# ---- build ---------------------------------------------------------------------------------------


def _find_compiler() -> tuple[str, ...]:
    """Return the command that compiles C++."""
    asked = os.environ.get("CXX")
    commands = [tuple(shlex.split(asked))] if asked else [(name,) for name in COMPILERS]
    for command in commands:
        if shutil.which(command[0]):
            return command
    tried = ", ".join(shlex.join(command) for command in commands)
    raise BuildError(f"there is no C++ compiler (tried {tried}); install one or set CXX")


def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).stdout.partition("\n")[0]


def _build_and_load(compiler: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library from the cache folder or, if that is of no use, a passing one."""
    try:
        return ctypes.CDLL(str(_build(compiler, _cache_folder())))
    except OSError:  # read-only, full, or mounted such that nothing in it may run
        with tempfile.TemporaryDirectory(prefix="amber-") as passing:
            return ctypes.CDLL(str(_build(compiler, Path(passing))))


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "amber-compile")


def _build(compiler: tuple[str, ...], folder: Path) -> Path:
    """Return the library's path in ``folder``, after compiling it there unless it is there."""
    path = folder / f"cpu-{_fingerprint(compiler)}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own, path.name)
            _compile(compiler, made)
            os.replace(made, path)
    return path


def _compile(compiler: tuple[str, ...], path: Path) -> None:
    """Compile the sources side by side, and link them to the library ``path``."""
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [path.with_name(f"{source.stem}.o") for source in sources]
    for this_cpu in THIS_CPU:
        command = [*compiler, *FLAGS, *this_cpu]
        with ThreadPoolExecutor(len(sources)) as pool:
            parts = zip(sources, objects, strict=True)
            calls = [[*command, "-c", str(source), "-o", str(made)] for source, made in parts]
            done = list(pool.map(_run, calls))
        if not any(one.returncode for one in done):
            done = [_run([*command, *map(str, objects), "-o", str(path)])]
        failed = next((one for one in done if one.returncode), None)
        if failed is None:
            return
    assert failed is not None, "the loop ends by its last failure"
    raise BuildError(f"{shlex.join(compiler)} failed: {failed.stderr.strip()[:500]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler, which speaks English."""
    english = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, env=english, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error


def _fingerprint(compiler: tuple[str, ...]) -> str:
    """Return a name for all that the library is made of."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    parts = [repr((compiler, _version(compiler), FLAGS, THIS_CPU, _cpu())).encode(), *sources]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    """Return the model and the instruction sets of this CPU."""
    told = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(told))
