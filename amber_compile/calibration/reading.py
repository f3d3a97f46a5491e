"""Read the calibration data through a model, pass by pass.

    reader.read("sensitivity", batches, visit)   ->  Statistics        visit(number, batch, into)

A pass goes over this rank's batches in order, shows a bar, keeps its sums now and then
(resume.py) and joins what all ranks have (distributed.py). A pass that was interrupted goes on
behind its last kept batch; one that was complete is not repeated.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .distributed import failing_together, rank, share
from .errors import CalibrationError
from .resume import Checkpoint
from .statistics import Statistics

Batches = Sequence[tuple[int, Any]]
"""Batches with their numbers among all: what is drawn for one depends on its number only."""
Visit = Callable[[int, Any, Statistics], None]
KEPT_EVERY = 15.0
"""Seconds between two writes of what a pass has measured."""


@dataclass(frozen=True)
class Reader:
    """Reads batches through ``model``.

    Attributes:
        model: in eval mode.
        checkpoint: where progress is kept.
        progress: show a bar for each pass.
    """

    model: nn.Module
    checkpoint: Checkpoint
    progress: bool = True

    def read(self, stage: str, batches: Batches, visit: Visit, label: str = "") -> Statistics:
        """Return what ``visit`` adds up over ``batches`` of all ranks.

        Args:
            stage: name of the pass, for the files that keep its progress.
            batches: of all ranks.
            visit: is given a batch, its number, and what to add to.
            label: what the bar says.

        Raises:
            CalibrationError: if ``visit`` fails on another rank.
        """
        with failing_together():
            own = share(batches)
            tensors, done = self.checkpoint.load(stage)
            statistics = Statistics.from_tensors(self._moved(tensors))
            kept = time.monotonic()
            for at, (_, (number, batch)) in enumerate(self.bar(own, done, label or stage)):
                visit(number, batch, statistics)
                if time.monotonic() - kept > KEPT_EVERY:
                    self.checkpoint.save(stage, statistics.tensors(), done + at + 1)
                    kept = time.monotonic()
            if done < len(own):
                self.checkpoint.save(stage, statistics.tensors(), len(own))
        return statistics.joined()

    def __call__(self, batch: Any) -> Any:
        """Return what the model answers to ``batch``: a tensor, a mapping or a sequence."""
        args, kwargs = inputs_of(batch, self.model)
        return self.model(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def _moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def bar(self, own: Sequence[Any], done: int, label: str, unit: str = "batch") -> Iterator[Any]:
        """Yield those of ``own`` behind the first ``done``, and show how far it is."""
        quiet = not self.progress or rank() != 0
        if quiet:
            return iter(own[done:])
        try:
            tqdm: Any = importlib.import_module("tqdm").tqdm
        except ImportError as cause:
            raise CalibrationError(
                "a progress bar needs tqdm: pip install 'amber-compile[calibrate]', or "
                "progress=False"
            ) from cause
        settings = {"desc": label, "unit": unit, "initial": done, "total": len(own)}
        return iter(tqdm(own[done:], leave=False, **settings))


def inputs_of(batch: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs: of a tensor, a mapping or a sequence, on the device."""
    device = next(model.parameters()).device
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    held = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)
    if isinstance(held, dict):
        return (), held
    return (tuple(held) if isinstance(held, tuple | list) else (held,)), {}


def first(batches: Batches, tokens: int) -> Batches:
    """Return the first batches, until they hold so many tokens."""
    counts = itertools.accumulate(tokens_of(batch) for _, batch in batches)
    return [
        one
        for one, count in zip(batches, counts, strict=True)
        if count - tokens_of(one[1]) < tokens
    ]


def tokens_of(batch: Any) -> int:
    """Return how many tokens a batch holds: elements of its first tensor, or rows of floats."""
    values = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return values[..., 0].numel() if values.is_floating_point() else values.numel()


@contextlib.contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Run a model eagerly, with the random numbers of the process left alone.

    Raises:
        CalibrationError: if the model is in training mode.
    """
    if model.training:
        raise CalibrationError("the model is in training mode; call model.eval() first")
    with torch.random.fork_rng(_gpus(model)), torch.compiler.set_stance("force_eager"):
        yield


def _gpus(model: nn.Module) -> list[int]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted(device.index or 0 for device in devices if device.type == "cuda")
