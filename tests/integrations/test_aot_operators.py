"""The operators as a library: Amber's answers, bit for bit, where Amber cannot be imported."""

import re
from pathlib import Path

import pytest
import torch
from operator_cases import bad_calls, good_calls
from torch_only import operator_library, run_torch_only, start

from amber_compile.cli import main
from amber_compile.kernels import compilation
from amber_compile.kernels.operator_library import build_operator_library, recipe

ANSWER = """
torch.ops.load_library(sys.argv[1])
answers = []
for name, arguments in torch.load(sys.argv[2]):
    try:
        answers.append(getattr(torch.ops.amber, name)(*arguments))
    except RuntimeError as error:
        answers.append(str(error))
torch.save(answers, sys.argv[3])
"""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(scope="module")
def library():
    return operator_library()


def answers_of(library, folder, calls, **environment):
    """Return what the library answers to ``calls``: tensors, or the message of an error."""
    torch.save(calls, folder / "calls.pt")
    run_torch_only(ANSWER, library, folder / "calls.pt", folder / "answers.pt", **environment)
    return torch.load(folder / "answers.pt")


def same_bits(left, right):
    """Return whether two answers are the same; NaN of any bits are alike."""
    if not isinstance(left, torch.Tensor):
        return len(left) == len(right) and all(map(same_bits, left, right))
    if (left.shape, left.dtype, left.stride()) != (right.shape, right.dtype, right.stride()):
        return False
    integer = INTEGERS[left.dtype.itemsize]
    nan = left.isnan() & right.isnan() if left.is_floating_point() else False
    return bool(((left.view(integer) == right.view(integer)) | nan).all())


def wrong(calls, answers):
    """Return the calls whose answer is not that of the operator that Python registers."""
    found = []
    for (name, arguments), answer in zip(calls, answers, strict=True):
        if isinstance(answer, str) or not same_bits(
            answer, getattr(torch.ops.amber, name)(*arguments)
        ):
            found.append((name, arguments, answer))
    return found


@pytest.fixture(scope="module")
def answers(library, tmp_path_factory):
    """What the library answers to the good calls, then to the bad ones."""
    calls = [*good_calls(), *(call for call, _ in bad_calls())]
    return answers_of(library, tmp_path_factory.mktemp("calls"), calls)


def test_answers_are_those_of_amber(answers):
    calls = good_calls()
    assert wrong(calls, answers[: len(calls)]) == []


def test_what_is_not_supported_is_a_clear_error(answers):
    bad = bad_calls()
    for (_, message), answer in zip(bad, answers[-len(bad) :], strict=True):
        assert isinstance(answer, str), message
        assert re.search(f"amber: .*{message}", answer)


def test_another_kernel_multiplies_alike(library, tmp_path):
    calls = [call for call in good_calls() if call[0] == "quantized_linear"]
    answers = answers_of(library, tmp_path, calls, AMBER_INT8_KERNEL="cpp")
    assert wrong(calls, answers) == []


def test_an_unknown_kernel_is_an_error(library, tmp_path):
    calls = [call for call in good_calls() if call[0] == "quantized_linear"][:1]
    (answer,) = answers_of(library, tmp_path, calls, AMBER_INT8_KERNEL="sse9")
    assert re.search("AMBER_INT8_KERNEL='sse9' is not in this library.*valid here: .*cpp", answer)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="waits for Linux")
def test_no_call_leaks_memory(library):
    """A call that names a dtype and a correction gets strings, which it must free."""
    run_torch_only(
        """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

torch.ops.load_library(sys.argv[1])
x, sizes = torch.randn(4, 8), []
for _ in range(3):
    for _ in range(20000):
        torch.ops.amber.nm_quantize(x, None, None, 2, 4, "int8", "variance")
    sizes.append(resident())
assert sizes[2] - sizes[1] < 20000 * 32, sizes  # the two strings of a call take 64 and more
""",
        library,
    )


# ---- Amber in the same process -------------------------------------------------------------------


def test_a_process_with_amber_keeps_its_own_operators(library):
    done = start(
        """
import sys, torch, amber_compile.kernels
torch.ops.load_library(sys.argv[1])
print(torch.ops.amber.nm_select(torch.tensor([4.0, 1, 2, 3]).double(), None, 2, 4).tolist())
""",
        library,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[4.0, 0.0, 0.0, 3.0]\n"  # float64, which the library does not have
    assert "amber: this process has amber::nm_select already, and keeps it" in done.stderr


def test_amber_behind_the_library_is_an_error_that_says_so(library):
    code = "import sys, torch\ntorch.ops.load_library(sys.argv[1])\nimport amber_compile.kernels"
    done = start(code, library)
    assert done.returncode == 1
    assert "RegistrationError: this process has amber::" in done.stderr
    assert "Import amber_compile first" in done.stderr


# ---- build ---------------------------------------------------------------------------------------


def test_the_library_is_built_once_and_copied(library, tmp_path):
    assert build_operator_library() == library
    put = build_operator_library(tmp_path)
    assert put == tmp_path / "libamber_ops.so"
    assert put.read_bytes() == library.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["libamber_ops.so"]


def test_the_command_writes_the_library(library, tmp_path, capsys):
    path = tmp_path / "folder" / "ops.so"
    assert main(["operators", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == library.read_bytes()


def test_an_unknown_cpu_is_an_error(library, tmp_path, capsys):
    assert main(["operators", "-o", str(tmp_path / "ops.so"), "--march", "z80"]) == 2
    assert "z80" in capsys.readouterr().err


def test_a_useless_cache_folder_is_done_without(monkeypatch, library, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(compilation.BuildError, match="cannot be written"):
        build_operator_library()
    monkeypatch.setattr(compilation, "compile_library", lambda recipe, by, path: path.touch())
    assert build_operator_library(tmp_path / "ops.so").exists()


def test_a_library_for_other_cpus_has_a_name_of_its_own(library):
    assert recipe("x86-64-v3").targets == (("-march=x86-64-v3",),)
    compiler = compilation.find_compiler()
    names = {compilation.fingerprint(recipe(march), compiler) for march in ("native", "x86-64-v3")}
    assert len(names) == 2
    assert library.stem.removeprefix("operators-") in names
