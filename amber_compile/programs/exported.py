"""Rewrite a program of ``torch.export``; what is derived from its weights becomes its buffers.

    inputs  p_w, x                  ->   inputs  p_w, b_amber_weight_norm_0, x
    y = aten.linear(x, p_w)              s = amber.nm_select(x, b_amber_weight_norm_0, 2, 4)
                                         y = aten.linear(s, p_w)

The weights of such a program are part of it and stay what they are, so what follows from them is
made once, now; nothing follows from one that the program itself writes to. A weight that nothing
reads any more, for its codes are read instead, is dropped from the state. Where a call may have one
token a sequence (a dynamic dimension without ``min=2``), the phase is unknown: such a call keeps
all channels, told at run time by its number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.utils._sympy.value_ranges import bound_sympy

from amber_compile.analysis import Analysis
from amber_compile.config import AmberConfig
from amber_compile.derived import derive
from amber_compile.errors import OptionError
from amber_compile.graph import copy_graph, positions
from amber_compile.naming import PARAMETER
from amber_compile.passes.classify_phase import Phase, classify_phase
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.passes.find_projections import find_projections
from amber_compile.passes.weight_operand import QUANTISED
from amber_compile.projection import fake
from amber_compile.report import Report
from amber_compile.rewritten import Rewritten

from .one_token import dense_for_one_token, sequence_sizes
from .rewriting import rewrite_analysed

HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
WRITTEN = (OutputKind.PARAMETER_MUTATION, OutputKind.BUFFER_MUTATION)


def rewrite_exported(
    program: ExportedProgram, config: AmberConfig
) -> tuple[ExportedProgram, Report]:
    """Return a rewritten copy of ``program``, and its report.

    Raises:
        OptionError: if a weight lies on another device than the graph records.
    """
    gm, nodes = copy_graph(program.graph_module)
    for old, new in nodes.items():
        new.name = old.name  # by which the signature knows it; a copy of "input" is "input_1"
    weights = _weights(program, gm)
    for node, (name, _) in weights.items():
        node.meta[PARAMETER] = name
    written = {one.target for one in program.graph_signature.output_specs if one.kind in WRITTEN}
    tensors = {node: one for node, (name, one) in weights.items() if name not in written}
    phase = _phase(program, gm)
    if phase == "unknown":
        config = dense_for_one_token(config, gm)
    analysis = Analysis.of(gm, (), config, tensors, phase)
    done, graph = rewrite_analysed(analysis, DerivedInputs)
    return _Exported(program, gm, tensors).finished(done), Report([graph])


def _weights(program: ExportedProgram, gm: GraphModule) -> Mapping[Node, tuple[str, torch.Tensor]]:
    """Return name and value of every weight: parameters, and buffers of two dimensions or more."""
    found = {}
    for node, spec in zip(positions(gm), program.graph_signature.input_specs, strict=True):
        name = str(spec.target)
        value = program.state_dict.get(name, program.constants.get(name))
        if spec.kind not in HELD or not isinstance(value, torch.Tensor):
            continue
        if value.device != fake(node).device:
            raise OptionError(
                f"the program's {name} lies on {value.device}, its graph records "
                f"{fake(node).device}; valid: one device for both, as after "
                "torch.export.passes.move_to_device_pass"
            )
        is_matrix = value.dim() >= 2 and (value.is_floating_point() or value.dtype in QUANTISED)
        if spec.kind is InputKind.PARAMETER or is_matrix:
            found[node] = name, value
    return found


def _phase(program: ExportedProgram, gm: GraphModule) -> Phase:
    """Return the phase of the graph, unknown where a call may have one token."""
    phase, sizes = classify_phase(find_projections(gm)), sequence_sizes(gm)
    if phase != "prefill" or sizes is None or isinstance(sizes[1], int):
        return phase
    bounds: Any = bound_sympy(sizes[1].node.expr, program.range_constraints)
    return "prefill" if bounds.lower >= 2 else "unknown"


class _Exported:
    """Makes a program of a rewritten graph, as like the one before as it can be."""

    def __init__(
        self, program: ExportedProgram, gm: GraphModule, held: Mapping[Node, torch.Tensor]
    ) -> None:
        self._program = program
        self._gm = gm
        self._held = held
        self._state = dict(program.state_dict)
        self._constants = dict(program.constants)
        self._specs = dict(zip(positions(gm), program.graph_signature.input_specs, strict=False))

    def finished(self, done: Rewritten | None) -> ExportedProgram:
        """Return the program of the graph."""
        if done is not None:
            self._add_buffers(done)
            self._drop_unread()
            self._gm.recompile()
        program = self._program
        return ExportedProgram(
            root=self._gm,
            graph=self._gm.graph,
            graph_signature=self._signature(),
            state_dict=self._state,
            range_constraints=dict(program.range_constraints),
            module_call_graph=list(program.module_call_graph),
            example_inputs=program.example_inputs,
            constants=self._constants,
            verifiers=program.verifiers,
        )

    def _add_buffers(self, done: Rewritten) -> None:
        """Make the further inputs buffers: behind the parameters and buffers, before the rest."""
        inputs = list(positions(self._gm))
        further = inputs[len(self._specs) :]
        kinds = [spec.kind for spec in self._specs.values()]
        start = max((at for at, kind in enumerate(kinds, 1) if kind in HELD[:2]), default=0)
        for node, one in zip(further, done.derived, strict=True):
            name = node.name
            while name in self._state or name in self._constants:
                name += "_"
            self._state[name] = derive(self._held[inputs[one.position]], one.request)
            if start < len(kinds):
                inputs[start].prepend(node)
            argument = TensorArgument(name=node.name)
            self._specs[node] = InputSpec(InputKind.BUFFER, argument, name, persistent=True)

    def _drop_unread(self) -> None:
        """Drop the weights that the graph no longer reads from it and from the state."""
        before = {node.name: node for node in positions(self._program.graph_module)}
        for node in self._held:
            if node.users or not before[node.name].users:
                continue
            name = str(self._specs.pop(node).target)
            self._gm.graph.erase_node(node)
            if all(spec.target != name for spec in self._specs.values()):
                self._state.pop(name, None)
                self._constants.pop(name, None)

    def _signature(self) -> ExportGraphSignature:
        inputs = [self._specs[node] for node in positions(self._gm)]
        before = self._program.graph_signature.output_specs
        nodes: Any = self._gm.graph.output_node().args[0]
        named = zip(before, nodes, strict=True)
        return ExportGraphSignature(inputs, [_renamed(spec, node) for spec, node in named])


def _renamed(spec: OutputSpec, node: Any) -> OutputSpec:
    """Return ``spec`` for what the output is now."""
    if not isinstance(spec.arg, TensorArgument):
        return spec
    return replace(spec, arg=TensorArgument(name=node.name))
