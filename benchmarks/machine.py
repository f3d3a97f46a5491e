"""Say where, when and with what something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from amber_compile.kernels import cpu_kernel


def machine() -> dict[str, str]:
    """Return CPU, GPU, load, versions and date: what every result is printed and stored with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": cpu_kernel(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **gpu(),
    }


def gpu() -> dict[str, str]:
    """Return name, size, driver and compiler of the current GPU; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": f"{found.name}, {found.multi_processor_count} multiprocessors",
        "gpu memory": f"{found.total_memory / 2**30:.0f} GiB",
        "gpu cache": f"{found.L2_cache_size / 2**20:.0f} MiB",
        "cuda": str(torch.version.cuda),
        "driver": _driver(),
        "triton": _version("triton"),
    }


def _driver() -> str:
    """Return what ``nvidia-smi`` says."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.split("\n")[0].strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
