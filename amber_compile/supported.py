"""Which versions of PyTorch Amber knows.

It reads what PyTorch does not promise to keep: Dynamo's records of a graph, how AOTAutograd names
inputs, the keys of Inductor's caches. On another version it says so before it touches a graph.
"""

from __future__ import annotations

import functools

import torch
from torch.torch_version import TorchVersion

from .errors import VersionError

OLDEST, BEYOND = "2.11", "2.14"
"""The oldest that works, and the first that nobody has tried; as in pyproject.toml."""


def check_torch() -> None:
    """Refuse a version of PyTorch that Amber does not know.

    Raises:
        VersionError: naming it and those that work.
    """
    _check(str(torch.__version__))


@functools.cache
def _check(version: str) -> None:
    if not OLDEST <= TorchVersion(version) < BEYOND:
        newest = f"2.{int(BEYOND.partition('.')[2]) - 1}"
        raise VersionError(
            f"torch {version} is not supported; valid: {OLDEST} to {newest} "
            f"(pip install 'torch>={OLDEST},<{BEYOND}')"
        )
