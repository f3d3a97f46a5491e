"""Tell what the backend would do with a model, without generating code or running the result.

    explain(model, input_ids)                                  -> Report
    explain(model, kwargs=tokenizer(text), pattern="8:16")     keyword inputs apart, as in export

Dynamo traces the model as ``torch.compile`` would, under ``no_grad`` and with the static shapes of
these inputs; each graph is analysed and rewritten by the backend's own code, then dropped.

- A model on the **meta device**, or of fake tensors, is traced from its shapes, whatever its size.
  Its weights hold no values: scores are neither computed nor checked to be finite.
- A model with **values** is traced with them. Nothing runs if it is one graph. Behind a graph break
  Python goes on with the dense graph's result, so such a model runs once, dense.
- Every ``nn.Linear`` is listed: those that no graph reads are dense, with that reason.

The model, the compiled code of the process and ``last_reports()`` stay as they are. A model that is
compiled already is traced as if it were not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from .config import AmberConfig
from .errors import OptionError, choices
from .naming import registered
from .report import Report

MADE_FOR = "cuda"
"""The device that a model without values is explained for, if none is named."""


def explain(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    capability: tuple[int, int] | None = None,
    dynamic: bool = False,
    **options: Any,
) -> Report:
    """Return the report of compiling ``model`` for these inputs, without compiling it.

    Args:
        model: on any device, the meta device included, and of any size.
        args: positional inputs of the model.
        kwargs: keyword inputs of the model; apart, so that none is taken for an option.
        device: to explain for, ``"cuda"`` or ``"cpu"``; by default where the model lies, and
            ``"cuda"`` for a model on the meta device.
        capability: compute capability of the GPU to explain for, such as ``(9, 0)``; by default
            that of the one here.
        dynamic: leave sizes symbolic, as ``torch.compile(dynamic=True)`` does.
        options: the fields of :class:`AmberConfig`.

    Raises:
        TypeError: if ``model`` is no module.
        OptionError: for an unknown option, value or device.
        RewriteError: under ``strict=True``, if a planned projection cannot be sparsified.
    """
    from .fake_model import has_no_values, stand_in, without_values
    from .kernels.cuda.device import assumed
    from .outside import linears_outside
    from .tracer import Tracer  # Dynamo: importing Amber does not import it

    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, not {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    config = replace(config_for(model, options), check=False)
    weightless = has_no_values(model)
    target = _device(model, device, weightless)
    _check_capability(capability, target)
    tracing: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    keywords = dict(kwargs or {})
    if weightless:
        tracing = mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = without_values(model, mode)
        args, keywords = tree_map(lambda value: stand_in(value, mode), (args, keywords))
    tracer = Tracer(config, target)
    with registered(model), torch.no_grad(), tracing, assumed(capability):
        stopped = tracer.trace(model, args, keywords, dynamic)
    report = Report(tracer.graphs, unended=tracer.breaks)
    report.outside = linears_outside(model, report, tracer.read, stopped)
    report.explained = _how(target, capability, weightless, stopped)
    return report


def _how(
    device: torch.device,
    capability: tuple[int, int] | None,
    weightless: bool,
    stopped: str | None,
) -> str:
    """Return in a sentence how the model was looked at."""
    target = f"{device.type} {capability[0]}.{capability[1]}" if capability else device.type
    values = (
        "from shapes alone: weights hold no values, so scores were neither computed nor checked"
        if weightless
        else "with its weights, whose scores were computed"
    )
    line = f"explained for {target}, {values}"
    return f"{line}; tracing stopped half-way: {stopped}" if stopped else line


# ---- options -------------------------------------------------------------------------------------


def config_for(model: nn.Module, options: Mapping[str, Any]) -> AmberConfig:
    """Read the options; tell a model's keyword from a misspelt option."""
    valid = {option.name for option in fields(AmberConfig)}
    inputs = inspect.signature(model.forward).parameters
    for name in options:
        if name not in valid and name in inputs:
            raise OptionError(
                f"{name}= is an input of the model, not an option: "
                f"pass it as kwargs={{{name!r}: ...}}"
            )
    return AmberConfig.from_options(None, options)


def _device(model: nn.Module, device: str | torch.device | None, weightless: bool) -> torch.device:
    """Return the device to explain for."""
    from .passes.decide import DEVICES  # the operators: not needed to import Amber

    if device is None:
        first = next(model.parameters(), None)
        device = MADE_FOR if weightless or first is None else first.device
    kind = str(device).split(":")[0]
    if kind not in DEVICES:
        raise OptionError(choices("device", kind, DEVICES))
    return torch.device(device)


def _check_capability(capability: tuple[int, int] | None, device: torch.device) -> None:
    if capability is None:
        return
    pair = isinstance(capability, tuple) and [*map(type, capability)] == [int, int]
    if not pair or device.type != "cuda":
        raise OptionError(
            f"capability={capability!r} for device={device.type!r}; valid: two whole numbers such "
            "as (9, 0), of a CUDA device"
        )
