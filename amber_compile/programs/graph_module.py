"""Rewrite a ``torch.fx.GraphModule``: of Dynamo, of ``make_fx``, of ``symbolic_trace``.

    y = self.q_proj(x)      ->      s = nm_select(x, derive(self.q_proj.weight, "..."), 2, 4)
                                    y = linear(s, self.q_proj.weight, self.q_proj.bias)

Parameters stay where they are and keep their names. A module that records no shapes is given them
by running it on fake tensors like ``example_inputs``, with symbolic sizes but for the last one.
Nothing guards such a module, or one of ``make_fx``, against a call with one token; so its phase is
unknown, and a call with one token is left dense at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from amber_compile.analysis import Analysis
from amber_compile.config import AmberConfig
from amber_compile.errors import OptionError
from amber_compile.graph import copy_graph, positions
from amber_compile.passes.derived_calls import DerivedCalls
from amber_compile.projection import value_of
from amber_compile.report import GraphReport

from .rewriting import rewrite_analysed


def rewrite_module(
    gm: GraphModule, config: AmberConfig, example_inputs: Sequence[Any] | None
) -> tuple[GraphModule, GraphReport]:
    """Return a rewritten copy of ``gm``, and its report."""
    copy, _ = copy_graph(gm)
    of_dynamo = any("example_value" in node.meta for node in positions(copy))
    inline_linears(copy)
    if not of_dynamo and not _records_values(copy):
        _record_values(copy, example_inputs)
    held = _held(copy, example_inputs if of_dynamo else None)
    analysis = Analysis.of(copy, (), config, held, None if of_dynamo else "unknown")
    done, report = rewrite_analysed(analysis, DerivedCalls, in_place=True)
    if done is None:
        return copy_graph(gm)[0], report
    copy.recompile()
    return copy, report


def inline_linears(gm: GraphModule) -> int:
    """Replace each call of an ``nn.Linear`` by ``linear`` of its parameters; return how many."""
    inlined = 0
    for node in list(gm.graph.find_nodes(op="call_module")):
        module = gm.get_submodule(str(node.target))
        if type(module) is not nn.Linear:
            continue
        with gm.graph.inserting_before(node):
            names = ["weight"] + ["bias"] * (module.bias is not None)
            held = [gm.graph.get_attr(f"{node.target}.{name}") for name in names]
            operands = (*node.args, *node.kwargs.values(), *held)
            new = gm.graph.call_function(nn.functional.linear, operands)
        new.meta = dict(node.meta)
        for one in held:
            if value_of(node) is not None:
                one.meta["val"] = getattr(module, str(one.target).rpartition(".")[2])
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        inlined += 1
    gm.recompile()
    return inlined


def _held(gm: GraphModule, inputs: Sequence[Any] | None) -> Mapping[Node, Any]:
    """Return the tensors behind the attributes of ``gm``, and behind its inputs."""
    own = {node: _attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    given = list(inputs) if inputs is not None else [value_of(node) for node in positions(gm)]
    if len(given) < len(positions(gm)):
        raise OptionError(
            f"example_inputs has {len(given)} values; valid: {len(positions(gm))}, one for each "
            "input of the program"
        )
    return own | dict(zip(positions(gm), given, strict=False))


def _attribute(gm: GraphModule, node: Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)


def _records_values(gm: GraphModule) -> bool:
    return all(value_of(node) is not None for node in gm.graph.nodes if node.op != "output")


def _record_values(gm: GraphModule, inputs: Sequence[Any] | None) -> None:
    """Run ``gm`` on fake tensors like ``inputs``.

    Raises:
        OptionError: without ``inputs``, or if they do not fit.
    """
    names = [node.name for node in positions(gm)]
    if inputs is None:
        raise OptionError(
            "example_inputs=None, and the program records no shapes; valid: values for "
            f"{', '.join(names)}, such as torch.fx.symbolic_trace's result is called with"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fakes = [_fake_input(mode, value) for value in inputs]
    try:
        with torch.no_grad():
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    except Exception as cause:
        raise OptionError(
            f"example_inputs do not fit the program, whose inputs are {', '.join(names)}: {cause}"
        ) from cause


def _fake_input(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [DimDynamic.DYNAMIC if size > 1 else DimDynamic.STATIC for size in value.shape]
    if value.is_floating_point():
        sizes[-1:] = [DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context)
