"""What is installed: the wheel, the sdist and an editable install, each from a clean copy.

    checkout  ->  sdist  ->  wheel  ->  a folder on sys.path

The copy leaves out what a build or a test run left behind, so that nothing old gets in. The wheel
is built from the sdist: what the sdist lacks, the wheel cannot have.
"""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"amber_compile-{PROJECT['version']}"

FORGET_EDITABLE = """
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
for name in [name for name in sys.modules if "__editable__" in name]:
    del sys.modules[name]
"""
"""Takes the editable install of the environment that runs the tests out of the search."""


def python(code: str, cwd: Path, *path: Path) -> str:
    """Run ``code`` in ``cwd`` with ``path`` before everything installed; return what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-W", "error", "-c", f"import sys\n{code}"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(hook: str, source: Path, out: Path) -> Path:
    """Call a hook of the build backend as pip does (PEP 517), without a network."""
    out.mkdir()
    command = f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})"
    subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, as a fresh clone has it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "amber", ignore=LEFT_BEHIND)


@pytest.fixture(scope="session")
def sdist(checkout: Path) -> Path:
    """The unpacked sdist."""
    archive = build("build_sdist", checkout, checkout.parent / "sdist")
    with tarfile.open(archive) as file:
        file.extractall(checkout.parent, filter="data")
    return checkout.parent / NAME


@pytest.fixture(scope="session")
def wheel(sdist: Path) -> Path:
    """A folder that the wheel was installed to."""
    archive = build("build_wheel", sdist, sdist.parent / "wheel")
    with zipfile.ZipFile(archive) as file:
        file.extractall(sdist.parent / "site")
    return sdist.parent / "site"


def files(folder: Path, *patterns: str) -> set[str]:
    """Return the files under ``folder`` that match, by their paths in it."""
    found = (path for pattern in patterns for path in folder.rglob(pattern))
    return {
        str(path.relative_to(folder))
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    }


# ---- contents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("amber_compile", "amber_compile"),
        ("amber_compile/passes", "passes"),
        ("amber_compile/kernels", "kernels"),
    ],
)
def test_wheel_has_every_file_of_the_packages(
    wheel: Path, checkout: Path, package: str, source: str
) -> None:
    patterns = ("*.py", "*.cpp", "*.h", "*.json", "*.jinja", "*.css", "*.js", "py.typed")
    inside = files(wheel / package, *patterns)
    if source == "amber_compile":
        inside = {file for file in inside if not file.startswith(("passes/", "kernels/"))}
    assert inside == files(checkout / source, *patterns)
    assert inside


def test_wheel_has_nothing_else(wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir()} == {
        "amber_compile",
        "amber_torch_logs",
        "amber_vllm",
        f"{NAME}.dist-info",
    }


def test_wheel_has_the_license_and_both_backends(wheel: Path) -> None:
    about = wheel / f"{NAME}.dist-info"
    assert (about / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    entries = (about / "entry_points.txt").read_text()
    assert "[torch_dynamo_backends]" in entries
    assert "amber = amber_compile.backend:amber" in entries
    assert "amber_eager = amber_compile.backend:amber_eager" in entries


@pytest.mark.parametrize("folder", ["amber_compile", "passes", "kernels"])
def test_sdist_has_every_source(sdist: Path, checkout: Path, folder: str) -> None:
    assert files(sdist / folder, "*") == files(checkout / folder, "*")


def test_top_level_holds_what_the_project_agreed_on(checkout: Path) -> None:
    code = {"amber_compile", "passes", "kernels", "tests", "examples", "docs", "benchmarks"}
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    there = {entry.name for entry in checkout.iterdir() if entry.suffix != ".egg-info"}
    assert there == code | files


# ---- imports -------------------------------------------------------------------------------------

WHERE = """
import amber_compile, amber_compile.passes, amber_compile.kernels
print(*(m.__file__ for m in (amber_compile, amber_compile.passes, amber_compile.kernels)))
"""


def modules(root: Path, passes: str, kernels: str) -> str:
    folders = ("amber_compile", passes, kernels)
    return " ".join(str(root / folder / "__init__.py") for folder in folders)


def test_wheel_is_imported_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    inside = modules(wheel, "amber_compile/passes", "amber_compile/kernels")
    assert python(WHERE, tmp_path, wheel) == inside


def test_checkout_is_imported_whole_from_its_root_beside_a_wheel(
    wheel: Path, checkout: Path
) -> None:
    assert python(FORGET_EDITABLE + WHERE, checkout, wheel) == modules(
        checkout, "passes", "kernels"
    )


def test_editable_install_is_imported_from_another_folder(checkout: Path, tmp_path: Path) -> None:
    archive = build("build_editable", checkout, tmp_path / "editable")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "site")
    add = f"import site\nsite.addsitedir({str(tmp_path / 'site')!r})"
    assert python(FORGET_EDITABLE + add + WHERE, tmp_path, tmp_path / "site") == modules(
        checkout, "passes", "kernels"
    )


def test_backends_are_listed_without_importing_amber(wheel: Path, tmp_path: Path) -> None:
    code = """
import torch
backends = torch._dynamo.list_backends()
print("amber" in backends, "amber_eager" in backends, "amber_compile" in sys.modules)
"""
    assert python(code, tmp_path, wheel) == "True True False"


def test_backend_is_found_by_name(wheel: Path, tmp_path: Path) -> None:
    code = """
import torch
linear = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64)})["q_proj"]
with torch.no_grad():
    torch.compile(linear, backend="amber_eager", options={"projections": "*"})(torch.ones(2, 8, 64))
import amber_compile
print(amber_compile.__file__, len(amber_compile.last_reports()))
"""
    assert python(code, tmp_path, wheel) == f"{wheel / 'amber_compile/__init__.py'} 1"


# ---- sources -------------------------------------------------------------------------------------


def imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)


def test_nobody_imports_passes_or_kernels_as_packages_of_their_own() -> None:
    """``import kernels`` would register every operator a second time."""
    folders = ("amber_compile", "passes", "kernels", "tests", "examples", "benchmarks")
    sources = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 20
    for file in sources:
        assert not {"passes", "kernels"} & {name.split(".")[0] for name in imported_names(file)}
