"""A node of a graph as the rules for channels see it: arguments, and the axes of its operands."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from amber_compile.passes.channel_axes import Dims
from amber_compile.projection import value_of

Flow = dict[Node, Any]
"""Node -> dimensions of its tensor, or a list of them for an operation with several outputs."""


class Call:
    """A node with its arguments by position or name, and the axes of its operands."""

    def __init__(self, node: Node, flow: Flow) -> None:
        self.node = node
        self._flow = flow

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def of(self, operand: Any) -> Dims:
        """Return the axes of a tensor."""
        found = self._flow[operand]
        if not isinstance(found, tuple):
            raise TypeError(f"{operand} is no tensor")
        return found

    def several(self, operand: Any) -> list[Any] | None:
        """Return the axes of each output of an operand that has several."""
        found = self._flow[operand]
        return found if isinstance(found, list) else None

    def dims(self, position: int, name: str) -> Dims:
        """Return the axes of a tensor argument."""
        return self.of(self.argument(position, name))

    @property
    def x(self) -> Dims:
        """The axes of the first argument."""
        return self.dims(0, "input")

    @property
    def sizes(self) -> list[int]:
        """The sizes of the result."""
        value = value_of(self.node)
        return [int(size) for size in value.shape]

    @property
    def operands(self) -> list[Dims]:
        """The axes of all tensor arguments."""
        found = (self._flow.get(source) for source in self.node.all_input_nodes)
        return [dims for dims in found if isinstance(dims, tuple)]
