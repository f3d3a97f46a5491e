"""What the tests of GPU kernels share: they need a device, and find their outputs poisoned."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import amber_compile.kernels  # noqa: F401  # registers torch.ops.amber


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is no NVIDIA GPU."""
    if torch.cuda.is_available() and torch.version.cuda:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    """The current CUDA device."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every uninitialised tensor with 0xFF: NaN in any float, and no legal metadata.

    What a kernel leaves unwritten then differs from the reference.
    """
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def bfloat16_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert as PyTorch does: the interpreter truncates to bfloat16, and loses its denormals."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton")
    language, convert = interpreter.tl, interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (language.float32, language.bfloat16):
            rounded = torch.from_numpy(np.array(data).view(np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (language.bfloat16, language.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


@pytest.fixture
def sparse_from_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply on the sparse unit whatever it takes, however few tokens a call has."""
    module = sys.modules["amber_compile.kernels.nm_linear"]
    monkeypatch.setattr(module, "_crossover", lambda x, weight: 1)


def poison(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return ``create`` with 0xFF in every byte that it allocates."""

    def created(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = create(*arguments, **options)
        if tensor.numel() and tensor.device.type != "meta":
            tensor.view(torch.uint8).fill_(255)
        return tensor

    return created
