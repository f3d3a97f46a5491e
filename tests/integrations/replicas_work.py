"""What each process of test_distributed_replicas.py does: FSDP2, DDP, stages of a pipeline."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
import torch.distributed as dist
from gated import ALL, Layers, decisions, fresh, new_values, seeded, tokens
from sharded_work import spread
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import amber_compile
from amber_compile import derived
from amber_compile.derivations import ScoreFactor

OPTIONS = {**ALL, "skip": ["layers.1.down_proj"]}
SEEDS = (0, 0, 1, 2)
"""Of the weights in one pass after the other."""


class Counted:
    """Counts how many factors are computed."""

    def __init__(self) -> None:
        self.count = 0
        compute = ScoreFactor.compute

        def counting(factor: ScoreFactor, weight: Tensor) -> Tensor:
            self.count += 1
            return compute(factor, weight)

        ScoreFactor.compute = counting  # type: ignore[method-assign]  # this process is the test's


def fully_sharded(rank: int, ranks: int, parts: str) -> list[tuple[Tensor, int, int]]:
    """Return what each pass answers, computes anew, and how many weights have factors after it.

    ``parts`` are compiled: the ``"layers"`` one by one, or the ``"whole"``.
    """
    fresh()
    mesh, counted = init_device_mesh("cpu", (ranks,)), Counted()
    model = seeded(Layers())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    amber_compile.register_model(model)
    for part in model.layers if parts == "layers" else [model]:
        part.compile(backend="amber_eager", options=OPTIONS)
    found = []
    with torch.no_grad():
        for at, seed in enumerate(SEEDS):
            if at and seed != SEEDS[at - 1]:
                _write(model, seed)
            before = counted.count
            answer = model(tokens())
            gc.collect()
            kept = sum(bool(one) for one in derived._derived.values())
            found.append((answer, counted.count - before, kept))
    assert decisions()["layers.1.down_proj"].startswith("dense: skip=")
    return found


def both(rank: int, ranks: int) -> list[tuple[int, Tensor, int]]:
    """Return the same of layers spread in two ways: by FSDP over rows, by channels in a row."""
    fresh()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    model, counted = spread(seeded(Layers()), mesh["tensor"]), Counted()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    amber_compile.register_model(model)
    for layer in model.layers:
        layer.compile(backend="amber_eager", options=OPTIONS)
    own, found = mesh["data"].get_local_rank(), []
    with torch.no_grad():
        for seed in SEEDS[1:3]:
            _write(model, seed)
            before = counted.count
            found.append((own, model(tokens(own)), counted.count - before))
    return found


def _write(model: nn.Module, seed: int) -> None:
    """Give the sharded parameters the values of ``seed``, as an optimiser writes to them."""
    for parameter, whole in zip(model.parameters(), new_values(Layers(), seed), strict=True):
        mesh, places = parameter.device_mesh, parameter.placements
        parameter.copy_(distribute_tensor(whole, mesh, places))


def stuck(rank: int, ranks: int) -> None:
    """Wait for a process that never comes."""
    if rank == 1:
        time.sleep(60)
    dist.barrier()


def data_parallel(rank: int, ranks: int) -> tuple[Tensor, dict[str, str]]:
    """Return what a model in ``DistributedDataParallel`` answers, compiled with its wrapper."""
    fresh()
    model = nn.parallel.DistributedDataParallel(seeded(Layers())).eval()
    model.compile(backend="amber_eager", options=OPTIONS)
    with torch.no_grad():
        return model(tokens(rank)), decisions()


def pipeline(rank: int, ranks: int) -> tuple[Tensor | None, dict[str, str]]:
    """Return what comes out of the last stage, and what this stage decided."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    fresh()
    model = seeded(Layers(4))
    amber_compile.register_model(model)
    first = rank * len(model.layers) // ranks
    stage: Any = nn.Sequential(*model.layers[first : first + len(model.layers) // ranks])
    for layer in stage:
        layer.compile(backend="amber_eager", options=OPTIONS)
    example = tokens().chunk(2)[0]
    held = PipelineStage(stage, rank, ranks, torch.device("cpu"), (example,), (example,))
    schedule = ScheduleGPipe(held, n_microbatches=2)
    with torch.no_grad():
        answer = schedule.eval(tokens()) if rank == 0 else schedule.eval()
    dist.barrier()
    return answer, decisions()
