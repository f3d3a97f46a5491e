"""What each process of test_distributed_tensors.py does, by PyTorch's ``parallelize_module``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from gated import ALL, Gated, Layers, compiled, decisions, fresh, new_values, seeded, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from amber_compile import Plan, Settings
from amber_compile.derivations import Matrix, ScoreFactor
from amber_compile.derived import derive
from amber_compile.plan import PlannedSite
from amber_compile.plan_tensors import PlanTensors


def plan_of(model: nn.Module) -> Plan:
    """Return a plan with factors of its own."""
    drawn, sites, held = torch.Generator().manual_seed(5), {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            choice = "why" if "up" in name else Settings(score="calibrated", correction="norm")
            sites[name] = PlannedSite(tuple(module.weight.shape), choice)
            factor = torch.rand(module.in_features, generator=drawn) + 0.1
            held[name] = {} if isinstance(choice, str) else {"factor": factor}
    return Plan(sites, {}, tensors=PlanTensors(held))


CASES: dict[str, dict[str, Any]] = {
    "plan": {"plan": plan_of(Layers(2))},
    "no correction": {**ALL, "correction": None},
    "norm": {**ALL, "correction": "norm"},
    "variance": {**ALL, "correction": "variance"},
    "prefix": {**ALL, "correction": "norm", "dense_prefix": 3},
    "few tokens": {**ALL, "correction": "norm", "min_tokens": 100},
    "cut": {**ALL, "pattern": "8:16"},
    "int8": {**ALL, "quantize": "int8"},
}


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,))


def spread(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread every gated layer of ``model`` as tensor parallelism does."""
    styles = {
        "gate_proj": ColwiseParallel(),
        "up_proj": ColwiseParallel(),
        "down_proj": RowwiseParallel(),
    }
    for layer in [one for one in model.modules() if isinstance(one, Gated)]:
        parallelize_module(layer, mesh, styles)
    return model


def parallel(
    rank: int, ranks: int, cases: Sequence[str]
) -> dict[str, tuple[Tensor, dict[str, str]]]:
    """Return what the layers answer and decide under each of some of ``CASES``."""
    mesh, found = mesh_of(ranks), {}
    for name, options in ((name, CASES[name]) for name in cases):
        fresh()
        model = compiled(spread(seeded(Layers(2)), mesh), options)
        with torch.no_grad():
            found[name] = model(tokens()), decisions()
    return found


def factors(rank: int, ranks: int) -> list[Tensor]:
    """Return this process's part of the factor of each weight: rows, columns, experts spread."""
    mesh, found = mesh_of(ranks), []
    for weight, places in weights_and_places():
        held = nn.Parameter(distribute_tensor(weight, mesh, [places], src_data_rank=None))
        factor = derive(held, ScoreFactor("robust_norm", Matrix()))
        assert derive(held, ScoreFactor("robust_norm", Matrix())) is factor
        found.append(factor)
    return found


def weights_and_places() -> list[tuple[Tensor, Any]]:
    from torch.distributed.tensor.placement_types import _StridedShard

    drawn = torch.Generator().manual_seed(3)
    matrix = torch.randn(16, 48, generator=drawn)
    experts = torch.randn(4, 8, 16, generator=drawn)
    placed = [Shard(0), Shard(1), Replicate(), _StridedShard(dim=0, split_factor=2)]
    return [(matrix, one) for one in placed] + [(experts, Shard(at)) for at in range(3)]


def by_inductor(rank: int, ranks: int) -> Tensor:
    """Return what a layer answers whose code Inductor generates."""
    fresh()
    model = compiled(spread(seeded(Gated()), mesh_of(ranks)), CASES["norm"], "amber")
    with torch.no_grad():
        answer: Tensor = model(tokens())
    return answer


def activations(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return tokens [9, 64], of zeros, with an infinity, a NaN, and squares that overflow."""
    drawn = torch.Generator().manual_seed(6)
    x, factor = torch.randn(9, 64, generator=drawn) + 0.5, torch.rand(64, generator=drawn)
    x[5] = 0
    x[6, 3], x[7, 40], x[8, :8] = torch.inf, torch.nan, 3e19
    return x.to(dtype), factor


def selected(rank: int, ranks: int) -> dict[Any, tuple[int, Tensor]]:
    """Return this process's slice of what the operator selects, for each type and correction."""
    group, found = dist.group.WORLD.group_name, {}
    for dtype in (torch.float32, torch.bfloat16):
        for correction in ("norm", "variance"):
            x, factor = (one.chunk(ranks, -1)[rank] for one in activations(dtype))
            arguments = (x, factor, 2, 4, correction, 1, 0, None, 64, group)
            found[dtype, correction] = rank, torch.ops.amber.nm_select_sharded(*arguments)
    return found


def written(rank: int, ranks: int) -> list[Tensor]:
    """Return the answers after each way to write to a weight, the same graph all the time."""
    fresh()
    mesh = mesh_of(ranks)
    model = compiled(spread(seeded(Gated()), mesh), ALL)
    found = []
    with torch.no_grad():
        for seed in range(4):
            values = new_values(seeded(Gated()), seed)
            for parameter, whole in zip(model.parameters(), values, strict=True):
                _write(parameter, whole, seed)
            found.append(model(tokens()))
    return found


def _write(parameter: Tensor, whole: Tensor, way: int) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    values = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    if way % 2:
        parameter.to_local().copy_(values.to_local())
    else:
        parameter.copy_(values)


class Alone(nn.Module):
    """One projection of what it is given."""

    def __init__(self, mesh: DeviceMesh, places: Any, width: int = 16) -> None:
        super().__init__()
        weight = new_values(nn.Linear(width, 8, bias=False), 0)[0]
        spread = distribute_tensor(weight, mesh, [places], src_data_rank=None)
        self.weight = nn.Parameter(spread)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Local(Alone):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to_local())


class Plain(nn.Module):
    """A row-parallel projection that says nothing about it: its shard is a plain parameter."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16 // ranks, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        dist.all_reduce(y)
        return y


def near_misses(rank: int, ranks: int) -> dict[str, str]:
    """Return what is decided for operands that are laid out otherwise."""
    mesh, found = mesh_of(ranks), {}

    def laid(*sizes: int, places: Any) -> Tensor:
        return DTensor.from_local(torch.randn(*sizes).double(), mesh, [places])

    cases = {
        "tokens": (Alone(mesh, Shard(0)), laid(2, 8, 16, places=Shard(1))),
        "partial": (Alone(mesh, Shard(0)), laid(2, 8, 16, places=Partial())),
        "whole x": (Alone(mesh, Shard(1)), laid(2, 8, 16, places=Replicate())),
        "matched": (Alone(mesh, Shard(1)), laid(2, 8, 16 // ranks, places=Shard(2))),
        "replicated": (Alone(mesh, Replicate()), laid(2, 8, 16, places=Replicate())),
        "uneven": (Local(mesh, Shard(1), 20), torch.randn(2, 8, -(-20 // ranks)).double()),
        "local rows": (Local(mesh, Shard(0)), torch.randn(2, 8, 16).double()),
        "local channels": (Local(mesh, Shard(1)), torch.randn(2, 8, 16 // ranks).double()),
        "plain": (Plain(ranks), torch.randn(2, 8, 16 // ranks).double()),
    }
    for name, (model, x) in cases.items():
        if name == "uneven":
            x = x[..., : model.weight.to_local().shape[-1]]
        fresh()
        with torch.no_grad():
            compiled(model, {"projections": ["*"]})(x)
        found[name] = ", ".join(decisions().values())
    return found


def errors(rank: int, ranks: int) -> list[tuple[str, float | None]]:
    """Return the errors that ``check=True`` measures."""
    import amber_compile

    fresh()
    model = compiled(spread(seeded(Gated()), mesh_of(ranks)), {**ALL, "check": True})
    with torch.no_grad():
        model(tokens())
    return [(site.name, site.error) for site in amber_compile.last_reports()[-1].sites]
