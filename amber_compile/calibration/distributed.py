"""Several processes that calibrate one model together, each on its share of the data.

    torchrun --nproc-per-node 2 calibrate.py           # after torch.distributed.init_process_group

Rank r of R reads batches r, r + R, r + 2R, ...; what it measures is added up (or the largest taken)
in float64 over all ranks, so that every rank decides the same, and what one process alone decides.
Without an initialised process group there is one rank.

An error on one rank is an error on all: nobody waits for a rank that has given up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CalibrationError

Item = TypeVar("Item")


def rank() -> int:
    """Return the number of this process, 0 if it is alone."""
    return dist.get_rank() if _together() else 0


def ranks() -> int:
    """Return how many processes calibrate together."""
    return dist.get_world_size() if _together() else 1


@contextlib.contextmanager
def joined_ranks(device: str) -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did and nobody has yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _together():
        yield
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(items: Sequence[Item]) -> list[tuple[int, Item]]:
    """Return this rank's items, each with its number among all."""
    return [(at, item) for at, item in enumerate(items) if at % ranks() == rank()]


def sums(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum over all ranks of each tensor, float64; absent on a rank counts as 0."""
    return _joined(tensors, 0.0)


def maxima(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the largest values over all ranks of each tensor; absent on a rank counts as -inf."""
    joined = _joined(tensors, float("-inf"))
    return {
        key: joined[key].to(tensors[key].dtype) if key in tensors else joined[key] for key in joined
    }


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every rank if the block raises on one.

    Raises:
        CalibrationError: on the ranks where nothing went wrong.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as cause:
        failure = cause
    told = gathered(f"{type(failure).__name__}: {failure}" if failure else None)
    if failure is not None:
        raise failure
    broken = next(((at, text) for at, text in enumerate(told) if text), None)
    if broken is not None:
        raise CalibrationError(f"rank {broken[0]} failed: {broken[1]}")


def gathered(value: Any) -> list[Any]:
    """Return what each rank has for ``value``, in the order of the ranks."""
    if not _together():
        return [value]
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, value)
    return found


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _joined(tensors: Mapping[str, Tensor], absent: float) -> dict[str, Tensor]:
    """Sum (``absent`` 0) or maximise (-inf) in the same order on every rank."""
    if not _together():
        return dict(tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    for known in gathered({key: tuple(value.shape) for key, value in tensors.items()}):
        shapes |= known
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    operation = dist.ReduceOp.MAX if absent else dist.ReduceOp.SUM
    found = {}
    for key, shape in sorted(shapes.items()):
        own = tensors.get(key)
        value = torch.full(shape, absent, dtype=torch.float64, device=device)
        if own is not None:
            value.copy_(own)
        dist.all_reduce(value, op=operation)
        found[key] = value if own is None else value.to(own.device)
    return found
