"""What this machine can run, and why not the rest: the facts behind ``amber env``.

Asking runs what is asked about: the C++ kernels are compiled, and each sparse product is tested
against its reference on each GPU. So the answer is what a model would meet here.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .kernels import cpu_kernel
from .kernels.cuda.device import (
    KINDS,
    instruction_of,
    why_no_sparse_product,
    why_no_triton,
)

PACKAGES = ("amber-compile", "torch", "triton", "transformers")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: as the driver gives it.
        capability: of its compute units, such as ``"9.0"``.
        products: for each kind of operand, the sparse instruction that multiplies it, or None.
        reasons: why there is none, for each kind without one.
        selection: ``"Triton"``, or why the slow reference selects.
    """

    name: str
    capability: str
    products: dict[str, str | None]
    reasons: dict[str, str]
    selection: str


@dataclass(frozen=True)
class Environment:
    """A machine as Amber sees it.

    Attributes:
        versions: of Python and the packages that matter; None where one is not installed.
        cpu: its name and number of cores.
        cpu_kernel: what selects on it.
        gpus: its CUDA devices.
        no_gpu: why there are none, if so.
    """

    versions: dict[str, str | None]
    cpu: str
    cpu_kernel: str
    gpus: tuple[Gpu, ...]
    no_gpu: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON values."""
        return asdict(self)


def environment() -> Environment:
    """Look at this machine."""
    no_gpu = _why_no_gpu()
    indices = () if no_gpu else range(torch.cuda.device_count())
    return Environment(
        versions={
            "python": platform.python_version(),
            **{one: installed_version(one) for one in PACKAGES},
        },
        cpu=f"{cpu_name()}, {os.cpu_count()} cores",
        cpu_kernel=cpu_kernel(),
        gpus=tuple(_gpu(torch.device("cuda", index)) for index in indices),
        no_gpu=no_gpu,
    )


def _gpu(device: torch.device) -> Gpu:
    major, minor = torch.cuda.get_device_capability(device)
    instruction = instruction_of((major, minor))
    reasons = {kind: why_no_sparse_product(device, kind) for kind in KINDS.values()}
    return Gpu(
        name=torch.cuda.get_device_name(device),
        capability=f"{major}.{minor}",
        products={
            kind: None if reason or instruction is None else instruction.name
            for kind, reason in reasons.items()
        },
        reasons={kind: reason for kind, reason in reasons.items() if reason},
        selection=why_no_triton() or "Triton",
    )


def _why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the name that the CPU gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
