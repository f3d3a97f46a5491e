"""Run Triton kernels on the CPU, through Triton's interpreter.

    kernels = interpreted("amber_compile.kernels.cuda.nm_compress")
    kernels.launch(...)                                    # every kernel of the module on NumPy

Triton decides when a kernel is *defined* whether it will be interpreted, so the module is loaded a
second time, under another name, and the compiled one stays as it is. Modules of kernels that it
imports are named behind it, and are loaded like it:

    kernels = interpreted("amber_compile.kernels.cuda.nm_select",
                          "amber_compile.kernels.cuda.channel_groups")
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from unittest.mock import patch

import pytest

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")
importlib.import_module("triton.runtime.interpreter")  # before sys.modules is patched: only once


@functools.cache
def interpreted(name: str, *imported: str) -> ModuleType:
    """Return a copy of the module ``name`` whose Triton kernels run in the interpreter."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"interpreted.{name}"] = module  # inspect reads a kernel's source by its module
    with triton.knobs.runtime.scope(), patch.dict(sys.modules):
        sys.modules.update({each: interpreted(each) for each in imported})
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    sys.modules[f"interpreted.{name}"] = module
    return module
