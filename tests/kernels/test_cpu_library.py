"""The C++ kernels are built once, kept, shared by processes, and missed with a reason."""

import shutil
import stat
import warnings

import pytest
import torch

from amber_compile.errors import OptionError
from amber_compile.kernels import compilation, cpu_kernel, cpu_library
from amber_compile.kernels.compilation import BuildError, find_compiler, fingerprint

nm_select = torch.ops.amber.nm_select
has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compilation.COMPILERS)), reason="waits for a C++ compiler"
)


@pytest.fixture
def new_process(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder; the environment is yours to set."""
    for name in ("CXX", "AMBER_CPU_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu_library._loaded.clear()
    yield monkeypatch
    cpu_library._loaded.clear()


def built(folder):
    return [path.name for path in (folder / "cache" / "amber-compile").glob("**/*")]


# ---- build ---------------------------------------------------------------------------------------


@has_compiler
def test_compiles_once_and_keeps_the_library(new_process, tmp_path):
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    real = shutil.which(find_compiler()[0])
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    compiler.chmod(stat.S_IRWXU)
    new_process.setenv("CXX", str(compiler))
    assert cpu_kernel().startswith("C++, compiled by ")
    calls = [line for line in log.read_text().splitlines() if "-O3" in line]
    assert sum(line.endswith(".so") for line in calls) == 1
    assert len(calls) == 1 + len(list(cpu_library.SOURCES.glob("*.cpp")))
    assert len(built(tmp_path)) == 1
    cpu_library._loaded.clear()
    assert cpu_kernel().startswith("C++, compiled by ")
    assert sum("-O3" in line for line in log.read_text().splitlines()) == len(calls)


@has_compiler
def test_whatever_makes_another_library_changes_its_name(new_process, tmp_path):
    compiler = find_compiler()
    names = [fingerprint(cpu_library.recipe(), compiler)] * 2
    assert names[0] == fingerprint(cpu_library.recipe(), compiler)
    copy = shutil.copytree(cpu_library.SOURCES, tmp_path / "sources")
    (copy / "floats.h").write_text("// changed")
    for module, name, value in (
        (cpu_library, "FLAGS", ("-O0",)),
        (compilation, "_cpu", lambda: "another"),
        (cpu_library, "SOURCES", copy),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            names.append(fingerprint(cpu_library.recipe(), compiler))
    assert len(set(names)) == 4


@has_compiler
def test_two_processes_build_at_once(start_python, tmp_path):
    code = "print(cpu_kernel(), nm_select(torch.tensor([1., 2, 3, 4]), None, 2, 4).tolist())"
    both = [start_python(code, XDG_CACHE_HOME=tmp_path / "cache", CXX="") for _ in range(2)]
    for process in both:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert output.startswith("C++")
        assert "[0.0, 0.0, 3.0, 4.0]" in output
    assert len(built(tmp_path)) == 1


@has_compiler
def test_a_useless_cache_folder_is_done_without(new_process, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    assert cpu_kernel().startswith("C++")


# ---- no C++ --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({"PATH": ""}, r"no C\+\+ compiler \(tried g\+\+, clang\+\+, c\+\+\)"),
        ({"CXX": "/nowhere/c++ -v"}, r"no C\+\+ compiler \(tried /nowhere/c\+\+ -v\)"),
        ({"CXX": "false"}, "false failed"),
    ],
)
def test_one_warning_tells_why_the_reference_runs(new_process, tmp_path, environment, cause):
    for name, value in environment.items():
        new_process.setenv(name, value)
    x = torch.tensor([4.0, 1, 2, 3])
    with pytest.warns(UserWarning, match=f"slow reference kernels.*{cause}"):
        y = nm_select(x, None, 2, 4)
    assert y.tolist() == [4, 0, 0, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm_select(x, None, 2, 4)
    assert cpu_kernel().startswith("reference: ")
    assert built(tmp_path) == []


def test_the_reference_can_be_asked_for(new_process, tmp_path):
    new_process.setenv("AMBER_CPU_KERNEL", "reference")
    assert nm_select(torch.tensor([4.0, 1, 2, 3]), None, 2, 4).tolist() == [4, 0, 0, 3]
    assert cpu_kernel() == "reference: AMBER_CPU_KERNEL=reference"
    assert built(tmp_path) == []


def test_cpp_asked_for_never_falls_back(new_process):
    new_process.setenv("AMBER_CPU_KERNEL", "cpp")
    new_process.setenv("CXX", "false")
    with pytest.raises(BuildError, match="false failed"):
        nm_select(torch.ones(4), None, 2, 4)


def test_an_unknown_kernel_is_an_error(new_process):
    new_process.setenv("AMBER_CPU_KERNEL", "cuda")
    with pytest.raises(OptionError, match="AMBER_CPU_KERNEL 'cuda'; valid: cpp, reference"):
        cpu_kernel()
