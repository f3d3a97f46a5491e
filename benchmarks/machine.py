"""Say where, when and with what something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess

import torch

from amber_compile.environment import cpu_name, installed_version
from amber_compile.kernels import cpu_kernel


def machine() -> dict[str, str]:
    """Return CPU, GPU, load, versions and date: what every result is printed and stored with."""
    return {
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
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
        "triton": installed_version("triton") or "none",
    }


def _driver() -> str:
    """Return what ``nvidia-smi`` says."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.split("\n")[0].strip()
