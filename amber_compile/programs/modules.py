"""Show what the modules of a ``torch.fx.GraphModule`` do, as far as they are plain linears.

    y = self.q_proj(x)      ->      y = linear(x, self.q_proj.weight, self.q_proj.bias)

Left alone, and listed in the report: subclasses of ``nn.Linear``, those with hooks or a ``forward``
of their own, which would be lost, and linears inside other modules that are called as a whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from amber_compile.outside import outside_site
from amber_compile.projection import value_of
from amber_compile.report import Site


def inline_linears(gm: GraphModule) -> int:
    """Replace calls of plain linears by ``linear`` of their parameters; return how many."""
    inlined = 0
    for node in gm.graph.find_nodes(op="call_module"):
        module = gm.get_submodule(str(node.target))
        if not _is_plain(module):
            continue
        with gm.graph.inserting_before(node):
            names = ["weight"] + ["bias"] * (module.bias is not None)
            held = [gm.graph.get_attr(f"{node.target}.{name}") for name in names]
            operands = (*node.args, *node.kwargs.values(), *held)
            new = gm.graph.call_function(nn.functional.linear, operands)
        new.meta = dict(node.meta)
        if isinstance(recorded := value_of(node), FakeTensor):
            for one in held:
                value = recorded.fake_mode.from_tensor(attribute(gm, one), static_shapes=True)
                one.meta["val"] = value
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        inlined += 1
    gm.recompile()
    return inlined


def _is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is nothing but ``linear``."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return type(module) is nn.Linear and "forward" not in vars(module) and not any(hooks)


def linears_inside(gm: GraphModule) -> list[Site]:
    """Return a row for each linear inside the modules that ``gm`` calls as a whole."""
    rows = {}
    for node in gm.graph.find_nodes(op="call_module"):
        called = gm.get_submodule(str(node.target))
        for name, module in called.named_modules(prefix=str(node.target)):
            if isinstance(module, nn.Linear):
                reason = f"it is called as a module ({type(called).__name__}), not as linear"
                rows[name] = outside_site(name, module, reason)
    return list(rows.values())


def merge_attributes(gm: GraphModule) -> int:
    """Read each attribute of ``gm`` once, so that what follows from it is derived once."""
    first: dict[Any, Node] = {}
    before = next(iter(node for node in gm.graph.nodes if node.op != "placeholder"))
    for node in gm.graph.find_nodes(op="get_attr"):
        known = first.setdefault(node.target, node)
        if known is not node:
            node.replace_all_uses_with(known)
            gm.graph.erase_node(node)
        elif node is not before:
            before.prepend(node)
    gm.recompile()
    return len(first)


def attribute(gm: GraphModule, node: Node) -> Any:
    """Return what a ``get_attr`` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)
