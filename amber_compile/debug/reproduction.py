"""Run what a reproducer script rebuilds (reproducer.py): dense, rewritten, compiled, compared.

    versions
    for each graph     the report of dense and sparse side by side      (compare.py)
                       generated code against the rewritten graph without, and against the dense one
    exit status        1 if something raised, is not finite, or differs more than ``tolerance``

Tensors are random, of the layout that they had. One that lay on a GPU lies on a CPU where there is
none, and that is said.
"""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amber_compile.plan import Plan
from amber_compile.report import Report

from .compare import check
from .output_error import level, output_error

Row = tuple[Any, ...]
"""Name, shape, stride, type, device and, for what a module holds, ``parameter`` or ``buffer``."""


@dataclass(frozen=True)
class Rebuilt:
    """A graph: the class of its module, its weights by qualified name, its inputs in order."""

    module: type[nn.Module]
    weights: Sequence[Row]
    inputs: Sequence[Row]

    def build(self) -> tuple[nn.Module, list[Tensor]]:
        """Return the module and its inputs, the same on every call."""
        generator = torch.Generator().manual_seed(0)
        module = self.module().eval()
        for path, *layout, kind in self.weights:
            *steps, leaf = path.split(".")
            owner = _submodule(module, steps)
            value = _random(layout, generator, weight=True)
            if kind == "parameter" and value.is_floating_point():
                owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
            else:
                owner.register_buffer(leaf, value)
        return module, [_random(layout, generator) for _, *layout in self.inputs]


def reproduce(
    graphs: Sequence[Rebuilt],
    plan: Path,
    backend: str,
    options: Mapping[str, Any],
    *,
    dynamic: bool,
    tolerance: float,
) -> int:
    """Run every graph, print what happens, and return the exit status.

    Args:
        graphs: what to run.
        plan: file of what is to be sparse.
        backend: ``amber`` or ``amber_eager``.
        options: further options of it.
        dynamic: leave sizes symbolic.
        tolerance: allowed relative error of generated code against the rewritten graph without.
    """
    _print_versions()
    chosen = {**options, "plan": Plan.load(plan)}
    failed = 0
    for graph in graphs:
        print(f"\n==== {graph.module.__name__}")
        try:
            with torch.no_grad():
                failed += _run(graph, backend, chosen, dynamic, tolerance)
        except Exception:  # whatever went wrong is what the script is for
            traceback.print_exc(file=sys.stdout)
            failed += 1
    print(f"\n{failed} of {len(graphs)} graphs failed" if failed else "\nnothing failed")
    return 1 if failed else 0


def _run(
    graph: Rebuilt, backend: str, options: Mapping[str, Any], dynamic: bool, tolerance: float
) -> bool:
    """Run one graph; return whether its result is wrong."""
    model, inputs = graph.build()
    report = check(model, *inputs, **options)
    print(report)
    outputs = [
        _compiled(graph, name, options, dynamic) for name in ("eager", "amber_eager", backend)
    ]
    generated = output_error(outputs[1], outputs[2])
    print(f"\n{backend} against the dense graph: {output_error(outputs[0], outputs[2])}")
    print(f"{backend} against the rewritten graph without generated code: {generated}")
    errors = [report.output.relative if report.output else 0.0, generated.relative]
    errors += [site.error or 0.0 for site in report.sites]
    if max(map(level, errors)) == float("inf"):
        print("FAILED: an error is not finite")
    elif generated.relative > tolerance:
        print(f"FAILED: generated code differs by more than {tolerance:g}")
    else:
        return False
    return True


def _compiled(graph: Rebuilt, backend: str, options: Mapping[str, Any], dynamic: bool) -> Any:
    """Return the output of a graph through ``backend``, where failures are errors."""
    torch._dynamo.reset()
    model, inputs = graph.build()
    own: dict[str, Any] = {"options": {**options, "strict": True}} if backend != "eager" else {}
    return torch.compile(model, backend=backend, dynamic=dynamic, **own)(*inputs)


def _print_versions() -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"amber-compile {Report().to_json()['amber']}, torch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}, {platform.machine()}, {gpu}")


# ---- tensors -------------------------------------------------------------------------------------


def _submodule(module: nn.Module, steps: Sequence[str]) -> nn.Module:
    """Return the module at a path, made where it is missing."""
    for step in steps:
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    return module


def _random(layout: Sequence[Any], generator: torch.Generator, weight: bool = False) -> Tensor:
    """Return a random tensor: weights of about unit gain, integers of 0 and 1."""
    shape, stride, dtype, device = layout
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    size = 0 if 0 in shape else reach
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(size, generator=generator)
        if weight:  # of a norm, a vector near 1; of a projection, a matrix [out, in]
            gain = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            values = values * gain + (len(shape) < 2)
    else:
        values = torch.randint(0, 2, (size,), generator=generator)
    if device != "cpu" and not torch.cuda.is_available():
        device = "cpu"
    return values.to(dtype).as_strided(shape, stride).to(device)
