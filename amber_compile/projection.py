"""A projection: one multiplication of activations by a weight, as a graph shows it.

y = linear(x, w, b)          w [N, K]        nn.Linear
y = addmm(b, x, w)           w [K, N]        GPT-2's Conv1D        (``transposed``)
y = grouped_mm(x, w, offs)   w [E, K, N]     experts of an MoE     (``experts`` = E)
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Projection:
    """A matmul with a parameter operand, found in a graph.

    Attributes:
        name: qualified name of the call site, such as ``model.layers.0.self_attn.q_proj``.
        node: the matmul.
        x: its activation operand, ``[..., K]``.
        weight: the graph input that holds the parameter.
        shape: ``(N, K)``, or ``(E, N, K)`` for experts, whatever the storage order.
        transposed: the parameter stores K before N.
        operator: how the graph spells the multiplication, for the report.
        gate_rows: how many leading output rows are the gate of a fused gate and up projection,
            where the graph shows it.
        unsupported: why this spelling cannot be sparsified, if it cannot.
    """

    name: str
    node: Node
    x: Node
    weight: Node
    shape: tuple[int, ...]
    transposed: bool
    operator: str
    gate_rows: int | None = None
    unsupported: str | None = None

    @property
    def channels(self) -> int:
        """K: the length of the contracted dimension."""
        return self.shape[-1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one row of ``x``."""
        return self.shape[-2] * self.shape[-1]


def fake(node: Node) -> torch.Tensor:
    """Return the fake tensor that tracing recorded for ``node`` (Dynamo or export graphs)."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"node {node.name} records no tensor but {type(value).__name__}")
    return value


def value_of(node: Node) -> Any:
    """Return what tracing recorded for ``node``, tensor or not; None if nothing."""
    return node.meta.get("example_value", node.meta.get("val"))


def fake_mode_of(*values: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the mode that the first fake tensor belongs to (none: a context that does nothing).

    Not ``detect_fake_mode``: inside a backend that finds the mode of the compilation to come.
    """
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    return modes[0] if modes else contextlib.nullcontext()
