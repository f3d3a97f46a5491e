"""What vLLM does with a pass, after its documentation, for machines without vLLM.

    Range              token counts from start to end, both inside
    Manager            one pass for Inductor, which asks each of its own whether it applies
    compile_ranges     one Inductor compilation of a module for each range; a call picks its own

As in vLLM, nobody says which inputs of a graph are weights, and the manager's uuid holds the range,
so that graphs of two ranges are never taken for each other. ``Mlp`` stands for a piece of a model
between two attentions: a fused gate and up projection, and a norm that adds the residual.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

CHANNELS, WIDTH = 32, 64


@dataclass(frozen=True)
class Range:
    """The token counts that one compilation serves."""

    start: int
    end: int


class PassManager(Protocol):
    """The manager of this file, or vLLM's own.

    Attributes:
        graphs: what became of the graph of each range that was compiled.
    """

    graphs: dict[Range, Graph]

    def compiling(self, compile_range: Range) -> contextlib.AbstractContextManager[None]:
        """Compile for one range."""


class Manager(CustomGraphPass):
    """The pass that Inductor is given, made of those that users and the engine ask for."""

    def __init__(self, *passes: Any) -> None:
        self.passes = passes
        self.range: Range | None = None
        self.graphs: dict[Range, Graph] = {}

    @contextlib.contextmanager
    def compiling(self, compile_range: Range) -> Iterator[None]:
        """Compile for one range."""
        self.range = compile_range
        yield
        self.range = None

    def __call__(self, graph: Graph) -> None:
        """Run the passes that apply, and take down what became of the graph."""
        assert self.range is not None
        for one in self.passes:
            if one.is_applicable_for_range(self.range):
                one(graph)
        self.graphs[self.range] = copy.deepcopy(graph)

    def uuid(self) -> str:
        """Return what the compiled graph depends on."""
        return f"{self.range}-{[one.uuid() for one in self.passes]}"


def compile_ranges(
    module: nn.Module, endpoints: Sequence[int], manager: PassManager
) -> Callable[[Tensor], Tensor]:
    """Compile ``module`` for every range that ``endpoints`` part, the last of them the largest."""
    ranges = [Range(before + 1, end) for before, end in pairwise([0, *endpoints])]

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled = {one: _compile(gm, manager, one) for one in ranges}
        at = next(at for at, value in enumerate(inputs) if isinstance(value, int | torch.SymInt))

        def run(*args: Any) -> Any:
            fits = next(one for one in ranges if one.start <= args[at] <= one.end)
            return compiled[fits](*args)

        return run

    compiled: Callable[[Tensor], Tensor]
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    return compiled


def _compile(gm: GraphModule, manager: PassManager, one: Range) -> Callable[..., Any]:
    inputs = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    with manager.compiling(one):
        compiled: Callable[..., Any] = torch._inductor.standalone_compile(
            copy.deepcopy(gm),
            inputs,
            dynamic_shapes="from_graph",
            options={"config_patches": {"post_grad_custom_post_pass": manager}},
        )
    return compiled


class AddAndClip(nn.Module):
    """A norm that adds the residual, as vLLM's do, but in whole numbers."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add, and clip at zero."""
        return torch.relu(x + residual)


class Mlp(nn.Module):
    """``relu(x + down(relu(gate(x)) * up(x)))`` of whole numbers: every sum is exact in float32."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = nn.Linear(CHANNELS, 2 * WIDTH, bias=False)
        self.mlp.down_proj = nn.Linear(WIDTH, CHANNELS, bias=False)
        self.norm = AddAndClip()
        for parameter in self.parameters():
            values = torch.randint(-2, 3, parameter.shape, generator=generator)
            parameter.requires_grad_(False).copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[tokens, CHANNELS]`` for ``[tokens, CHANNELS]``."""
        gate, up = self.mlp.gate_up_proj(x).chunk(2, -1)
        return self.norm(x, self.mlp.down_proj(torch.relu(gate) * up))


def tokens(count: int) -> Tensor:
    """Return so many rows of small whole numbers."""
    return torch.randint(-3, 4, (count, CHANNELS)).float()
