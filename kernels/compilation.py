"""C++ libraries, compiled where they are used, and kept on disk.

    build(recipe, compiler, folder)      the library in ``folder``, compiled unless it is there

Its name changes with the sources, the flags, the compiler and the CPU. Sources are compiled side by
side. Processes may do so at once: each writes files of its own and renames one. The compiler is
``$CXX`` or, as for Inductor, the first of g++, clang++ and c++.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from amber_compile.errors import AmberError

COMPILERS = ("g++", "clang++", "c++")
THIS_CPU = (("-march=native",), ("-mcpu=native",), ())


class BuildError(AmberError, RuntimeError):
    """The C++ kernels could not be built; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What a library is made of.

    Attributes:
        name: what its file name begins with.
        folders: of its sources, and of what those include.
        flags: of the compiler and of the linker.
        targets: flags for the CPU; the first that the compiler takes.
        libraries: what it is linked with.
    """

    name: str
    folders: tuple[Path, ...]
    flags: tuple[str, ...]
    targets: tuple[tuple[str, ...], ...] = THIS_CPU
    libraries: tuple[str, ...] = ()


def find_compiler() -> tuple[str, ...]:
    """Return the command that compiles C++.

    Raises:
        BuildError: if there is none.
    """
    asked = os.environ.get("CXX")
    commands = [tuple(shlex.split(asked))] if asked else [(name,) for name in COMPILERS]
    for command in commands:
        if shutil.which(command[0]):
            return command
    tried = ", ".join(shlex.join(command) for command in commands)
    raise BuildError(f"there is no C++ compiler (tried {tried}); install one or set CXX")


def version(compiler: tuple[str, ...]) -> str:
    """Return the first line that the compiler says about itself."""
    return _run([*compiler, "--version"]).stdout.partition("\n")[0]


def cache_folder() -> Path:
    """Return where libraries are kept; it may not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "amber-compile")


def build(recipe: Recipe, compiler: tuple[str, ...], folder: Path) -> Path:
    """Return the library's path in ``folder``, after compiling it there unless it is there.

    Raises:
        BuildError: if it cannot be compiled.
        OSError: if ``folder`` is of no use.
    """
    path = folder / f"{recipe.name}-{fingerprint(recipe, compiler)}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own, path.name)
            compile_library(recipe, compiler, made)
            os.replace(made, path)
    return path


def compile_library(recipe: Recipe, compiler: tuple[str, ...], path: Path) -> None:
    """Compile the sources side by side, and link them to the library ``path``.

    Raises:
        BuildError: with what the compiler says.
    """
    sources = sorted(one for folder in recipe.folders for one in folder.glob("*.cpp"))
    objects = [path.with_name(f"{at}-{source.stem}.o") for at, source in enumerate(sources)]
    for target in recipe.targets:
        command = [*compiler, *recipe.flags, *target]
        with ThreadPoolExecutor(len(sources)) as pool:
            parts = zip(sources, objects, strict=True)
            calls = [[*command, "-c", str(source), "-o", str(made)] for source, made in parts]
            done = list(pool.map(_run, calls))
        if not any(one.returncode for one in done):
            link = [*command, *map(str, objects), *recipe.libraries, "-o", str(path)]
            done = [_run(link)]
        failed = next((one for one in done if one.returncode), None)
        if failed is None:
            return
    assert failed is not None, "the loop ends by its last failure"
    raise BuildError(f"{shlex.join(compiler)} failed: {failed.stderr.strip()[:500]}")


def fingerprint(recipe: Recipe, compiler: tuple[str, ...]) -> str:
    """Return a name for all that the library is made of."""
    files = [path for folder in recipe.folders for path in sorted(folder.iterdir())]
    sources = [path.read_bytes() for path in files if path.is_file()]
    how = (compiler, version(compiler), recipe.flags, recipe.targets, recipe.libraries, _cpu())
    return hashlib.sha256(b"\0".join([repr(how).encode(), *sources])).hexdigest()[:16]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler, which speaks English."""
    english = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, env=english, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error


def _cpu() -> str:
    """Return the model and the instruction sets of this CPU."""
    told = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(told))
