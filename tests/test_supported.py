"""Versions of PyTorch: which are taken, and what is said of the others."""

import tomllib
from pathlib import Path

import pytest
import torch

from amber_compile import AmberConfig, rewrite
from amber_compile.errors import VersionError
from amber_compile.integrations.inductor import AmberPass
from amber_compile.supported import BEYOND, OLDEST, check_torch

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu", "2.13.9"])
def test_these_are_taken(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    check_torch()


@pytest.mark.parametrize("version", ["1.13.1", "2.10.0+cpu", "2.14.0", "2.14.1+cu130", "3.0.0"])
def test_others_are_refused_with_the_valid_ones(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(VersionError) as refused:
        check_torch()
    assert str(refused.value).startswith(f"torch {version} is not supported; valid: 2.11 to 2.13")


def test_the_package_asks_for_the_same():
    assert f"torch>={OLDEST},<{BEYOND}" in PROJECT["dependencies"]


def test_nothing_is_compiled_or_rewritten_under_another(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    with pytest.raises(VersionError):
        AmberPass(AmberConfig())
    with pytest.raises(VersionError):
        rewrite(torch.fx.symbolic_trace(torch.nn.Linear(4, 4)))
    model = torch.compile(torch.nn.Linear(4, 4), backend="amber_eager")
    with torch.no_grad(), pytest.raises(Exception, match=r"torch 2\.14\.0 is not supported"):
        model(torch.ones(2, 4))
