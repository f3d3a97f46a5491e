"""Rewrite a program of ``torch.export``; what is derived from its weights becomes its buffers.

    inputs  p_w, x                  ->   inputs  p_w, b_amber_weight_norm_0, x
    y = aten.linear(x, p_w)              s = amber.nm_select(x, b_amber_weight_norm_0, 2, 4)
                                         y = aten.linear(s, p_w)

The weights of such a program are part of it and are not written to, so what follows from them is
made once, now. A weight that nothing reads any more, for its codes are read instead, is dropped
from the state. Where a call may have one token (a dynamic dimension without ``min=2``), the phase
is unknown: a call with one token is left dense at run time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node

from amber_compile.analysis import Analysis
from amber_compile.config import AmberConfig
from amber_compile.derived import derive
from amber_compile.errors import OptionError
from amber_compile.graph import copy_graph, positions
from amber_compile.naming import PARAMETER
from amber_compile.passes.classify_phase import classify_phase, reshapes_of
from amber_compile.passes.derived_inputs import DerivedInputs
from amber_compile.passes.find_projections import find_projections
from amber_compile.passes.weight_operand import QUANTISED
from amber_compile.projection import fake
from amber_compile.report import GraphReport
from amber_compile.rewritten import Rewritten

from .rewriting import rewrite_analysed

HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def rewrite_exported(
    program: ExportedProgram, config: AmberConfig
) -> tuple[ExportedProgram, GraphReport]:
    """Return a rewritten copy of ``program``, and its report.

    Raises:
        OptionError: if a weight lies on another device than the graph records.
    """
    gm, _ = copy_graph(program.graph_module)
    held = _weights(program, gm)
    for node, (name, _) in held.items():
        node.meta[PARAMETER] = name
    tensors = {node: tensor for node, (_, tensor) in held.items()}
    analysis = Analysis.of(gm, (), config, tensors, _phase(program, gm))
    done, report = rewrite_analysed(analysis, DerivedInputs, in_place=True)
    return _Exported(program, gm, tensors).finished(done), report


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


def _phase(program: ExportedProgram, gm: GraphModule) -> Any:
    """Return the phase of the graph, unknown where a call may have one token."""
    projections = find_projections(gm)
    phase = classify_phase(projections)
    if phase != "prefill":
        return phase
    for projection in projections:
        origin = fake(reshapes_of(projection.x)[0])
        tokens = origin.shape[1] if origin.dim() == 3 else None
        if isinstance(tokens, torch.SymInt):
            symbols = program.range_constraints.items()
            free = tokens.node.expr.free_symbols
            least = [bounds.lower for symbol, bounds in symbols if symbol in free]
            return "prefill" if least and min(least) >= 2 else "unknown"
        if tokens is not None:
            return phase
    return phase


class _Exported:
    """Makes a program of a rewritten graph, as like the one before as it can be."""

    def __init__(
        self, program: ExportedProgram, gm: GraphModule, held: Mapping[Node, torch.Tensor]
    ) -> None:
        self._program = program
        self._gm = gm
        self._held = held
        self._state = dict(program.state_dict)
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
            range_constraints=copy.deepcopy(program.range_constraints),
            module_call_graph=copy.deepcopy(program.module_call_graph),
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )

    def _add_buffers(self, done: Rewritten) -> None:
        """Make the further inputs buffers: behind the parameters and buffers, before the rest."""
        weights = list(positions(self._gm))
        further = weights[len(self._specs) :]
        behind = [node for node, spec in self._specs.items() if spec.kind in HELD[:2]][-1]
        for node, one in zip(further, done.derived, strict=True):
            name = node.name
            while name in self._state:
                name += "_"
            self._state[name] = derive(self._held[weights[one.position]], one.request)
            behind.append(node)
            behind = node
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

    def _signature(self) -> ExportGraphSignature:
        inputs = [self._specs[node] for node in positions(self._gm)]
        outputs = copy.deepcopy(self._program.graph_signature.output_specs)
        nodes: Any = self._gm.graph.output_node().args[0]
        for spec, node in zip(outputs, nodes, strict=True):
            if isinstance(spec.arg, TensorArgument):
                spec.arg.name = node.name
        return ExportGraphSignature(inputs, outputs)
