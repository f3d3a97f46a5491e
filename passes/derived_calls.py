"""Give a graph what follows from its weights by calls of an operator.

    calls.node(w, request)    ->  derive(w, "request"), one for equal ones

In the place of further inputs (``derived_inputs.py``) where nobody could pass them: in a graph
after AOTAutograd, or in a module that others will call. What a call returns is a copy, or lent to a
compiler that knows it is not its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

import amber_compile.derive_operator  # noqa: F401  # registers torch.ops.amber.derive
from amber_compile.passes.derived_inputs import DerivedInput, DerivedInputs
from amber_compile.request_text import to_text


class DerivedCalls(DerivedInputs):
    """What one graph derives from its weights while it runs: copies of what is kept."""

    _arguments: tuple[bool, ...] = ()

    def _make(self, wanted: DerivedInput, title: str, empty: torch.Tensor) -> Node:
        inputs = self._graph.find_nodes(op="placeholder")
        behind = inputs[-1] if wanted.weight in inputs else wanted.weight
        target = torch.ops.amber.derive.default
        arguments: Any = (wanted.weight, to_text(wanted.request), *self._arguments)
        with self._graph.inserting_after(behind):
            node = self._graph.create_node("call_function", target, arguments, name=title)
        node.meta["example_value"] = empty
        return node


class SharedCalls(DerivedCalls):
    """The same without copies, for a compiler that is told not to reuse their memory."""

    _arguments = (False,)
