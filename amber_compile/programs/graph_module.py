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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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
from amber_compile.report import Report
from amber_compile.shards import is_sharded

from .modules import attribute, inline_linears, linears_inside, merge_attributes
from .one_token import dense_for_one_token
from .rewriting import rewrite_analysed

RECORDED = ("val", "example_value", "tensor_meta")
"""Keys of a node's ``meta`` under which tracing records its value."""


def rewrite_module(
    gm: GraphModule, config: AmberConfig, example_inputs: Sequence[Any] | None
) -> tuple[GraphModule, Report]:
    """Return a rewritten copy of ``gm``, and its report."""
    copy, _ = copy_graph(gm)
    of_dynamo = any("example_value" in node.meta for node in positions(copy))
    if example_inputs is not None:
        example_inputs = _with_defaults(copy, example_inputs)
    inline_linears(copy)
    merge_attributes(copy)
    if not of_dynamo and not _records_values(copy):
        _record_values(copy, example_inputs)
    if not of_dynamo:
        config = dense_for_one_token(config, copy)
    held = _held(copy, example_inputs if of_dynamo else None)
    analysis = Analysis.of(copy, (), config, held, None if of_dynamo else "unknown")
    done, graph = rewrite_analysed(analysis, DerivedCalls)
    report = Report([graph], outside=linears_inside(copy))
    if done is None:
        return copy_graph(gm)[0], report
    copy.recompile()
    return copy, report


# ---- values --------------------------------------------------------------------------------------


def _with_defaults(gm: GraphModule, inputs: Sequence[Any]) -> Sequence[Any]:
    """Return ``inputs`` and the defaults of those that are left out.

    Raises:
        OptionError: if there are not as many as the program takes.
    """
    left_out = list(positions(gm))[len(inputs) :]
    given = [*inputs, *(node.args[0] for node in left_out if node.args)]
    if len(given) != len(positions(gm)):
        raise OptionError(
            f"example_inputs has {len(inputs)} values; valid: {len(positions(gm))}, one for each "
            f"input of the program: {_names(gm)}"
        )
    return given


def _held(gm: GraphModule, inputs: Sequence[Any] | None) -> Mapping[Node, Any]:
    """Return the tensors behind the attributes of ``gm``, and behind its inputs."""
    own = {node: attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    given = list(inputs) if inputs is not None else [value_of(node) for node in positions(gm)]
    held = own | dict(zip(positions(gm), given, strict=True))
    spread = next((node.name for node, value in held.items() if is_sharded(value)), None)
    if spread:
        raise OptionError(
            f"program holds {spread} as a DTensor, which no operator looks up in a call; valid: "
            "plain tensors (spread models: torch.compile(model, backend='amber'))"
        )
    return held


def _records_values(gm: GraphModule) -> bool:
    """Whether ``gm`` records the values of its nodes, and all of one fake mode."""
    values = [value_of(node) for node in gm.graph.nodes if _has_value(gm, node)]
    modes = {id(one.fake_mode) for one in values if isinstance(one, FakeTensor)}
    return len(modes) <= 1 and all(one is not None for one in values)


def _has_value(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` is a value of the program: not its output, nor the body of an operator."""
    if node.op == "get_attr":
        return not isinstance(attribute(gm, node), GraphModule)
    return node.op != "output"


def _names(gm: GraphModule) -> str:
    return ", ".join(node.name for node in positions(gm))


def _record_values(gm: GraphModule, inputs: Sequence[Any] | None) -> None:
    """Run ``gm`` on fake tensors like ``inputs``.

    Raises:
        OptionError: without ``inputs``, or if they do not fit.
    """
    if inputs is None:
        raise OptionError(
            "example_inputs=None, and the program does not record its shapes; valid: values for "
            f"{_names(gm)}, such as torch.fx.symbolic_trace's result is called with"
        )
    for node in gm.graph.nodes:  # one that was recorded is of another fake mode
        for key in RECORDED:
            node.meta.pop(key, None)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fakes = [_fake_input(mode, value) for value in inputs]
    try:
        with torch.no_grad():
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    except Exception as cause:
        raise OptionError(
            f"example_inputs do not fit the program, whose inputs are {_names(gm)}: {cause}"
        ) from cause


def _fake_input(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [DimDynamic.DYNAMIC if size > 1 else DimDynamic.STATIC for size in value.shape]
    if value.is_floating_point():
        sizes[-1:] = [DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context)
