"""Look at a model with its user's own text, and plan the most sparsity for the least damage.

    plan = calibrate(model, batches, pattern="2:4", max_error=0.02)
    plan.save("model.plan");   torch.compile(model, backend="amber", options={"plan": plan})

1. ask the backend which projections it can make sparse                          candidates.py
2. read the text once: ranges, gradients, and what pruning each site does        sensitivity.py
   (permute channels, for as long as the calibration lasts, if that is allowed   ordering.py)
3. try the scores and corrections that are allowed on text that was held out,
   and keep per site those that are best                                         choosing.py
4. choose sites by a knapsack over the damage, and run them together on the
   held-out text, until the damage of the whole is what was asked for            allocation.py
5. tune what is left to tune together, if the held-out text is better for it     tuning.py
6. write down what was decided, what it should cost, and how it came about       making.py

How much is sparse: ``max_error`` bounds the damage of the whole model on held-out text, as a mean
over tokens (KL in nats for logits, half the squared relative error for other outputs);
``coverage`` asks for a share of the linear multiply-accumulates; ``rule="paper"`` takes the paper's
projections. Without any of them the bound is what the paper's method costs on the same text.

There is never a second copy of the model, and it is afterwards what it was, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from amber_compile.fake_model import has_no_values
from amber_compile.plan import Plan

from .errors import CalibrationError
from .making import Calibration
from .options import CalibrationOptions
from .reading import Reader, as_it_is
from .resume import Checkpoint, data_digest, model_digest
from .run import Run

LEAST = 2
"""Batches without which nothing can be held out."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    progress: bool = True,
    resume: str | PathLike[str] | None = None,
    **options: Any,
) -> Plan:
    """Return the plan that makes the most of ``model`` sparse for the least damage.

    Args:
        model: in eval mode, with its weights, on any device.
        batches: inputs of the model: tensors, keyword inputs, or tuples. Half a dozen batches of a
            few thousand tokens are a start.
        progress: show a bar for each pass.
        resume: a folder that keeps progress; an interrupted calibration goes on from it.
        options: the fields of :class:`CalibrationOptions`.

    Raises:
        TypeError: if ``model`` is no module.
        OptionError: for an option that is unknown or malformed.
        CalibrationError: if text, model or kept progress do not allow it.
    """
    return calibration(
        model, batches, CalibrationOptions.from_keywords(options), progress=progress, resume=resume
    ).plan


def calibration(
    model: nn.Module,
    batches: Iterable[Any],
    options: CalibrationOptions,
    *,
    progress: bool = True,
    resume: str | PathLike[str] | None = None,
) -> Calibration:
    """Return the plan of :func:`calibrate` with everything that was measured."""
    began = time.monotonic()
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate takes a torch.nn.Module, not {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if has_no_values(model):
        raise CalibrationError("the model has shapes and no values: load its weights")
    held = list(batches)
    if len(held) < LEAST:
        raise CalibrationError(
            f"{len(held)} batches of text are too few: at least {LEAST}, one to fit and one to "
            "hold out"
        )
    facts = {"model": model_digest(model), "data": data_digest(held), "options": options.to_json()}
    with as_it_is(model):
        checkpoint = Checkpoint(None if resume is None else Path(resume), facts)
        run = Run(Reader(model, checkpoint, progress), held, options)
        return run.finish(began)
