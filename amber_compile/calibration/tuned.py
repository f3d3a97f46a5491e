"""The numbers that are tuned, and the state of the optimiser that tunes them.

    values     "site|name" -> fp32        name: "output_scale", "output_bias", "weight" of a plan
    rate       RATES[name] · unit · share of the schedule
    unit       of α 1, of β the rms of the output at the first batch, of a weight its rms

A product takes the weight in the model's own type, as it will be run. Ranks may be interrupted
between the writes of two of them: states of different steps are not gone on from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .observe import Call
from .resume import Checkpoint
from .selection import Sparse, sparse_product
from .statistics import SEPARATOR

TUNES = {"output": ("output_scale", "output_bias"), "weight": ("weight",)}
RATES = {"output_scale": 0.01, "output_bias": 0.01, "weight": 0.01}
MOMENTS = (0.9, 0.99)
"""How much Adam keeps at each step of the mean of gradients, and of that of their squares."""
SMALLEST = 1e-30
SETTING = {"weight": "updated_weight"}
"""Settings that are called otherwise than the tensor they speak of."""
STATE = ("exp_avg", "exp_avg_sq", "step")


class Tuned:
    """The sparse sites of ``case``, with ``names`` of each tuned where it has them."""

    def __init__(self, case: Mapping[str, Sparse], names: Iterable[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self._case = dict(case)
        self._names = tuple(names)
        self._groups: list[dict[str, Any]] = []

    def meet(self, call: Call, y: Tensor) -> None:
        """Tune the site of ``call``, whose output is ``y`` before."""
        sparse = self._case[call.name]
        if sparse.settings.part or call.weight.dim() != 2:
            return
        start = {
            "output_scale": (torch.ones(y.shape[-1]), 1.0),
            "output_bias": (torch.zeros(y.shape[-1]), _rms(y)),
            "weight": (_in_plan_order(call.weight, sparse), _rms(call.weight)),
        }
        for name in self._names:
            value, unit = sparse.tensors.get(name, start[name][0]), start[name][1]
            leaf = value.detach().to(y.device, torch.float32, copy=True).requires_grad_()
            self.values[f"{call.name}{SEPARATOR}{name}"] = leaf
            self._groups.append({"params": [leaf], "unit": unit * RATES[name]})

    @cached_property
    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._groups, lr=0.0, betas=MOMENTS, eps=SMALLEST)

    def product(self, call: Call) -> Tensor:
        """Return the output of ``call``, differentiable by what is tuned."""
        return sparse_product(call, self._with(call.name, self.values))

    def step(self, gradients: Mapping[str, Tensor], share: float) -> None:
        """Take one step against ``gradients``, at ``share`` of the rates."""
        for key, value in self.values.items():
            value.grad = gradients[key].to(value)
        for group in self._adam.param_groups:
            group["lr"] = group["unit"] * share
        self._adam.step()

    def case(self) -> dict[str, Sparse]:
        """Return the sites as they are now."""
        values = {key: value.detach() for key, value in self.values.items()}
        return {site: self._with(site, values) for site in self._case}

    def _with(self, site: str, values: Mapping[str, Tensor]) -> Sparse:
        keys = {name: f"{site}{SEPARATOR}{name}" for name in self._names}
        own = {name: values[key] for name, key in keys.items() if key in values}
        sparse = self._case[site]
        flags: dict[str, Any] = {SETTING.get(name, name): True for name in own}
        return Sparse(replace(sparse.settings, **flags), {**sparse.tensors, **own})

    # ---- state -----------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint, stage: str, steps: int) -> None:
        """Keep the values and Adam's state after ``steps``."""
        kept = {f"value{SEPARATOR}{key}": value.detach() for key, value in self.values.items()}
        for key, value in self.values.items():
            state = self._adam.state[value]
            kept |= {f"{part}{SEPARATOR}{key}": state[part] for part in STATE}
        checkpoint.save(stage, kept, steps)

    def load(self, checkpoint: Checkpoint, stage: str) -> int:
        """Go on from what was kept, and return after how many steps."""
        kept, steps = checkpoint.load(stage)
        if len(set(distributed.gathered(steps))) > 1 or not steps:
            return 0
        for key, value in self.values.items():
            value.data.copy_(kept[f"value{SEPARATOR}{key}"])
            parts = {part: kept[f"{part}{SEPARATOR}{key}"] for part in STATE}
            self._adam.state[value] = {
                k: v if k == "step" else v.to(value) for k, v in parts.items()
            }
        return steps


def _rms(values: Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


def _in_plan_order(weight: Tensor, sparse: Sparse) -> Tensor:
    if not sparse.settings.permuted:
        return weight
    return weight[:, sparse.tensors["permutation"].long().to(weight.device)]
