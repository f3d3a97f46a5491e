"""Stand-ins for what has shapes and no values: models on the meta device, and other devices.

    without_values(model)      a copy whose tensors are fake, to be traced as if on a CPU
    on_device(gm, "cuda")      a traced graph whose recorded tensors lie on that device
    OnAnyBuild()               the functions of such tensors that need a build with that device

A meta model is traced as a CPU model, whose operations PyTorch has in every build, and its graph is
then moved. Model code that asks for the device meets a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .graph import copy_graph
from .projection import value_of

TRACED_ON = torch.device("cpu")


def has_no_values(model: torch.nn.Module) -> bool:
    """Whether some parameter or buffer of ``model`` is a meta or a fake tensor."""
    tensors = (*model.parameters(), *model.buffers())
    return any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


def without_values(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """Return a copy of ``model`` with fake tensors of ``mode`` for its own, and leave it alone.

    The copy shares nothing that holds values, so a model of any size takes the space of its shapes.
    """
    stand_ins: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for value in held.values():
                if isinstance(value, torch.Tensor) and id(value) not in stand_ins:
                    stand_ins[id(value)] = stand_in(value, mode)
    return copy.deepcopy(model, stand_ins)


def stand_in(value: Any, mode: FakeTensorMode) -> Any:
    """Return a fake tensor like ``value``; what is no tensor comes back as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=TRACED_ON)
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(fake, value.requires_grad)
    return fake


def on_device(gm: GraphModule, device: torch.device) -> GraphModule:
    """Return a copy of a traced graph whose values lie on ``device``, views still views."""
    moved, _ = copy_graph(gm)
    for node in moved.graph.nodes:
        if isinstance(value_of(node), torch.Tensor | tuple | list):
            key = "example_value" if "example_value" in node.meta else "val"
            node.meta[key] = tree_map(lambda value: _moved(value, device), node.meta[key])
    return moved


GUARDED = (torch.Tensor.__getitem__, torch.Tensor.contiguous)
"""Functions whose Python binding switches to the device of a tensor, even of a fake one."""


class OnAnyBuild(TorchFunctionMode):
    """Runs those functions of fake tensors as if on a CPU: a build may lack the device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in GUARDED and isinstance(args[0], FakeTensor):
            device, here = args[0].device, _moved(args[0], TRACED_ON)
            return _moved(func(here, *args[1:], **(kwargs or {})), device)
        return func(*args, **(kwargs or {}))


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with in_kernel_invocation_manager(value.fake_mode):  # shows the meta tensor inside
        moved = FakeTensor(value.fake_mode, value, device)
    if isinstance(value, torch.nn.Parameter):
        moved._is_param = True
    return moved
