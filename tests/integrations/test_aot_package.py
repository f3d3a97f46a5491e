"""A rewritten program, packaged by AOTInductor, gives the backend's answers without Amber.

One program has it all: float32 and bfloat16, selections, codes, and projections left alone.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from aot_model import Model, exported, prompts, torch_warnings
from torch.torch_version import TorchVersion
from torch_only import operator_library, run_torch_only

from amber_compile import AmberConfig, rewrite
from amber_compile.kernels.compilation import find_compiler

OPTIONS = {"correction": "norm"}
if TorchVersion(torch.__version__) >= "2.12":  # packages of 2.11 mistake one dtype for another
    OPTIONS |= {"quantize": "int8", "quantize_skip": ["*gate_proj"]}
RUN = """
library, package, folder = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(package)
except RuntimeError as error:
    print(error)
torch.ops.load_library(library)
program = torch._inductor.aoti_load_package(package)
answers = [program(ids) for ids in torch.load(f"{folder}/prompts.pt")]
torch.save(answers, f"{folder}/answers.pt")
"""
MAIN = Path(__file__).parents[2] / "examples" / "cpp" / "main.cpp"
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def package(tmp_path_factory, inductor):
    """The package of the rewritten model, and the library that it needs."""
    library = operator_library()
    with torch_warnings():
        program, report = rewrite(exported(Model(mixed=True)), AmberConfig(**OPTIONS))
    assert {site.name for site in report.sites if site.decision.settings} >= {
        "layers.0.gate_proj",
        "layers.1.down_proj",
    }
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    with torch_warnings(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path, library


@pytest.fixture(scope="module")
def answers(package, tmp_path_factory):
    """What the package answers without Amber; and what it said before the library was loaded."""
    path, library = package
    folder = tmp_path_factory.mktemp("answers")
    torch.save(prompts(), folder / "prompts.pt")
    said = run_torch_only(RUN, library, path, folder)
    return torch.load(folder / "answers.pt"), said


@torch.no_grad()
def test_answers_are_those_of_the_backend(answers):
    compiled = torch.compile(Model(mixed=True), backend="amber", dynamic=True, options=OPTIONS)
    for logits, ids in zip(answers[0], prompts(), strict=True):
        assert torch.equal(logits, compiled(ids))


def test_without_the_library_the_package_names_the_operator(answers):
    assert "Could not find schema for amber::nm_" in answers[1]


# ---- C++ -----------------------------------------------------------------------------------------


def by_cmake(folder):
    """Build the example as its page says; return the program."""
    source, build = MAIN.parent, folder / "build"
    found = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    done = run("cmake", "-S", source, "-B", build, found)
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", build)
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "next_token"


def by_hand(folder):
    """Build the example by the compiler alone; return the program."""
    program, libraries = folder / "next_token", TORCH / "lib"
    flags = ("-std=c++20", "-isystem", TORCH / "include", "-o", program)
    names = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl")
    linked = ("-L", libraries, f"-Wl,-rpath,{libraries}", *names)
    done = run(*find_compiler(), MAIN, *flags, *linked)
    assert done.returncode == 0, done.stderr
    return program


def run(*command):
    words = list(map(str, command))
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_program_in_cpp_predicts_the_same_token(package, answers, tmp_path):
    path, library = package
    for_cpus = torch.version.cuda is None  # else PyTorch's CMake files ask for the CUDA toolkit
    program = (by_cmake if for_cpus and shutil.which("cmake") else by_hand)(tmp_path)
    assert run(program).returncode == 2
    nowhere = run(program, tmp_path / "nothing.so", path, 1, 2)
    assert nowhere.returncode == 1
    assert "nothing.so" in nowhere.stderr
    for logits, ids in zip(answers[0], prompts(), strict=True):
        done = run(program, library, path, *ids[0].tolist())
        assert done.returncode == 0, done.stderr
        best = int(logits[0, -1].argmax())
        assert done.stdout == f"token {best}, logit {float(logits[0, -1, best]):.9g}\n"
