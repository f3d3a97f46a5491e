"""Amber's pass behind AOTAutograd without Inductor: seconds less, and the graph is what runs."""

from collections.abc import Callable, Sequence

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule
from torch.nn import Module

from amber_compile import AmberConfig
from amber_compile.integrations.inductor import AmberPass

try:
    from functorch.compile import make_boxed_func
except ImportError:
    from torch._functorch.aot_autograd import make_boxed_func


def behind_aot(
    *passes: Callable[[Graph], None], seen: list[GraphModule] | None = None
) -> Callable[..., object]:
    """Return a backend that runs ``passes`` where Inductor would, and then the graph as it is."""

    def compiler(gm: GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        for one in passes:
            one(gm.graph)
        gm.recompile()
        if seen is not None:
            seen.append(gm)
        return make_boxed_func(gm.forward)

    return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)


def rewritten(model: Module, seen: list[GraphModule] | None = None, **options: object) -> Module:
    """Compile ``model`` with Amber's pass, and nothing generated."""
    amber = AmberPass(AmberConfig(**options))
    return torch.compile(model, backend=behind_aot(amber, seen=seen))


def targets(gm: GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
