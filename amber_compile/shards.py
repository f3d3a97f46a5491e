"""Weights that are spread over processes (``DTensor``), and what each process holds of the rest.

    weight [N, K] on one axis of a mesh     its x               its factor [K]
    rows spread          Shard(0)           all channels        that of the whole weight
    channels spread      Shard(1)           a slice of them     the same slice of that
    on every process     Replicate()        all channels        that of the whole weight

Experts [E, N, K] that are spread by expert have the rows of the factor [E, K] spread likewise.

A factor is a norm over all rows, so it is computed from the whole weight: gathered, one weight at a
time, on every process (``full_tensor``, a collective that all of them call in the same order), and
then cut. It is so the factor of one process alone, bit for bit. What comes out, and what goes into
the graph, is a plain tensor: this process's part.

``torch.distributed.tensor`` takes a second to import, so it is looked up only where somebody else
has imported it: no ``DTensor`` can exist before.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .derivations import Derivation


def is_sharded(value: object) -> TypeGuard[Any]:
    """Whether ``value`` is a ``DTensor``: of any placement, also on every process."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_fake(weight: torch.Tensor) -> bool:
    """Whether a weight, or this process's part of it, has no values."""
    return isinstance(local_of(weight), FakeTensor)


def local_of(weight: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a weight: itself if it is not spread."""
    local: torch.Tensor = weight._local_tensor if is_sharded(weight) else weight
    return local


# ---- derived tensors -----------------------------------------------------------------------------


def compute(weight: torch.Tensor, derivation: Derivation) -> torch.Tensor:
    """Return this process's part of what ``derivation`` makes of the whole weight."""
    if not is_sharded(weight):
        return derivation.compute(weight)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    tensor = derivation.compute(weight.full_tensor())
    places: list[Any] = [Replicate()] * weight.device_mesh.ndim
    for axis, dim in sharded_dims(weight).items():
        if dim == weight.dim() - 1:
            places[axis] = Shard(tensor.dim() - 1)
        elif dim < weight.dim() - 2:
            places[axis] = Shard(dim)
    spread = distribute_tensor(tensor, weight.device_mesh, places, src_data_rank=None)
    local: torch.Tensor = spread.to_local()
    return local


def like(weight: torch.Tensor, derivation: Derivation) -> torch.Tensor:
    """Return an empty tensor of the shape of that part, from a fake weight."""
    local = local_of(weight)
    empty = derivation.like(local)
    if is_sharded(weight) and empty.shape[-1] != local.shape[-1]:
        empty = empty.new_empty((*empty.shape[:-1], local.shape[-1]))
    return empty


# ---- layouts -------------------------------------------------------------------------------------


def laid_out_like(local: torch.Tensor, whole: Any) -> torch.Tensor:
    """Return the ``DTensor``, laid out as ``whole``, of which this process has ``local``."""
    made: torch.Tensor = type(whole).from_local(
        local, whole.device_mesh, whole.placements, run_check=False
    )
    return made


@dataclass(frozen=True, slots=True)
class Slices:
    """How the channels of a weight are spread.

    Attributes:
        size: how many each process has.
        group: name of the process group that has all of them.
    """

    size: int
    group: str


def sharded_dims(weight: Any) -> dict[int, int]:
    """Return ``{axis of the mesh: dimension of the tensor}`` where a ``DTensor`` is cut."""
    cut = {axis: getattr(own, "dim", None) for axis, own in enumerate(weight.placements)}
    return {axis: dim % weight.dim() for axis, dim in cut.items() if dim is not None}


def slices_of(weight: Any) -> Slices | None:
    """Return how the channels of a ``DTensor`` are spread, its last dimension; None if not."""
    axes = [axis for axis, dim in sharded_dims(weight).items() if dim == weight.dim() - 1]
    if not axes:
        return None
    mesh = weight.device_mesh
    return Slices(weight.shape[-1] // mesh.size(axes[0]), mesh.get_group(axes[0]).group_name)


def why_not_cut(weight: Any, multiple: int) -> str | None:
    """Return why this process's part of a ``DTensor`` does not do for its projection, or None.

    The answer is the same on every process: all of them compile the same, or the collectives of
    one would wait for the others for ever.
    """
    from torch.distributed.tensor import Partial, Shard

    if any(isinstance(own, Partial) for own in weight.placements):
        return f"its weight is laid out as {_names(weight)}: a sum that is still to be taken"
    channels = weight.shape[-1]
    dims = sharded_dims(weight)
    axes = [axis for axis, dim in dims.items() if dim == weight.dim() - 1]
    if not axes:
        return None
    if len(axes) > 1 or type(weight.placements[axes[0]]) is not Shard:
        return f"its channels are spread as {_names(weight)}; valid: Shard on one axis of the mesh"
    parts = weight.device_mesh.size(axes[0])
    if channels % parts or channels // parts % multiple:
        return (
            f"K = {channels} is cut for {parts} processes, and {channels} / {parts} is not a "
            f"multiple of M = {multiple}"
        )
    return None


def _names(weight: Any) -> str:
    return "(" + ", ".join(map(str, weight.placements)) + ")"
