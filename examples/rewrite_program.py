"""Rewrite two programs that somebody else will run: a traced module, and an exported one.

    python examples/rewrite_program.py
    python examples/rewrite_program.py --quantize int8

Prints each program before and after, what became of its projections, and how far the answers of the
rewritten one are from the dense ones. Nothing is compiled; it takes seconds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, symbolic_trace

from amber_compile import AmberConfig, rewrite

WIDTH, MIDDLE = 256, 512


class Mlp(nn.Module):
    """A gated MLP, as most language models have one in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, MIDDLE, bias=False)
        self.up_proj = nn.Linear(WIDTH, MIDDLE, bias=False)
        self.down_proj = nn.Linear(MIDDLE, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, S, WIDTH]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def show(title: str, before: Graph, after: Graph) -> None:
    """Print the calls of a graph before and after."""
    for when, graph in (("before", before), ("after", after)):
        print(f"\n{title}, {when}")
        for node in graph.nodes:
            if node.op.startswith("call_"):
                operands = ", ".join(map(short, node.args))
                print(f"  {node.name} = {name_of(node.target)}({operands})")


def short(argument: Any) -> str:
    """Return an argument in a few letters: the text of a request is long."""
    text = str(argument)
    return text if len(text) <= 32 else f"{text[:29]}..."


def name_of(target: Any) -> str:
    """Return what a node calls."""
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return str(target) if isinstance(target, torch._ops.OpOverload) else str(name)


def compare(dense: Tensor, answer: Tensor) -> None:
    """Print how far an answer is from the dense one."""
    error = (answer - dense).norm() / dense.norm()
    print(f"relative error of the answer, for random weights: {error:.3f}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="2:4", help="N:M, such as 2:4, 4:8, 8:16")
    parser.add_argument("--quantize", choices=["int8", "fp8"], help="8-bit products too")
    args = parser.parse_args()
    config = AmberConfig(pattern=args.pattern, quantize=args.quantize)
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(2, 32, WIDTH)

    traced = symbolic_trace(model)
    module, report = rewrite(traced, config, example_inputs=(x,))
    show("symbolic_trace", traced.graph, module.graph)
    print(f"\n{report}")
    compare(model(x), module(x))

    length = torch.export.Dim("length", min=2, max=512)
    exported = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    program, _ = rewrite(exported, config)
    show("torch.export", exported.graph, program.graph)
    print("\nits state")
    for name, tensor in program.state_dict.items():
        print(f"  {name:<24} {str(tensor.dtype).removeprefix('torch.'):<9} {list(tensor.shape)}")
    compare(model(x), program.module()(x))
    same = torch.equal(module(x), program.module()(x))
    print(f"both programs answer {'the same, bit for bit' if same else 'differently'}")


if __name__ == "__main__":
    main()
