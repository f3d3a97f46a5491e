"""Give a graph further inputs for what follows from its weights.

    inputs.node(w, request)    ->  the placeholder for ``request`` of ``w``, one for equal ones

The passes ask while they rewrite; whoever calls the graph computes the tensors (``derived.py``) and
appends them to its arguments, in the order of ``inputs.requests``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from amber_compile.derivations import Derivation
from amber_compile.graph import add_input
from amber_compile.projection import fake, fake_mode_of
from amber_compile.shards import like


@dataclass(frozen=True, slots=True)
class DerivedInput:
    """A graph input that holds what ``request`` makes of ``weight``."""

    weight: Node
    request: Derivation


class DerivedInputs:
    """The further inputs of one graph.

    Attributes:
        requests: what they are, in their order.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._graph: Graph = gm.graph
        self._nodes: dict[DerivedInput, Node] = {}

    @property
    def requests(self) -> list[DerivedInput]:
        return list(self._nodes)

    def items(self) -> list[tuple[DerivedInput, Node]]:
        """Return each request and where it is in the graph, in their order."""
        return list(self._nodes.items())

    def node(self, weight: Node, request: Derivation, name: str) -> Node:
        """Return the placeholder of ``request``, called ``amber_<name>_<number>`` if it is new."""
        wanted = DerivedInput(weight, request)
        if wanted not in self._nodes:
            value = fake(weight)
            with fake_mode_of(value):
                empty = like(value, request)
            title = f"amber_{name}_{len(self._nodes)}"
            self._nodes[wanted] = self._make(wanted, title, empty)
        return self._nodes[wanted]

    def _make(self, wanted: DerivedInput, title: str, empty: torch.Tensor) -> Node:
        """Return the node of a new request, whose tensor will be like ``empty``."""
        return add_input(self._graph, title, empty)

    def asked(self, node: Node) -> DerivedInput | None:
        """Return what the placeholder ``node`` holds, if it is one of these."""
        return next((wanted for wanted, own in self._nodes.items() if own is node), None)

    def drop_unread(self) -> None:
        """Remove the placeholders that nothing reads any more."""
        for wanted, node in list(self._nodes.items()):
            if not node.users:
                self._graph.erase_node(node)
                del self._nodes[wanted]
