"""Say where, when and with what something was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

from amber_compile.kernels import cpu_kernel


def machine() -> dict[str, str]:
    """Return CPU, load, versions and date: what every result is printed and stored with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": cpu_kernel(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
