"""Graphs as plain data: what a graph looked like, long after the compiler took it apart.

    linear: f32[1, s0, 64] = linear(x, q_proj.weight, None)  # model.layers.0.self_attn.q_proj
    └ name  └ value          └ target and arguments            └ site

A sketch holds no tensor and no node. It is made of every graph while it is compiled (stages.py) and
kept packed (:class:`Stage`): 2,500 nodes take about 50 KB. Sketches are read a *layer* at a time:
the nodes of a module whose path ends in its first number, such as ``model.layers.0``.
"""

from __future__ import annotations

import marshal
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import OptionError, choices

INPUTS = ("placeholder", "get_attr")
"""The ``op`` of nodes that compute nothing."""

_NAME = re.compile(r"(?<!['\w])\w+(?!['\w])")
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


class SketchNode(NamedTuple):  # a tuple is made in a fifth of a frozen dataclass's time
    """A node of a graph.

    Attributes:
        name: its name, unique in the graph.
        op: ``placeholder``, ``get_attr``, ``call_function``, ``call_method``, ``call_module`` or
            ``output``.
        target: what it calls: ``linear``, ``amber.nm_select``; of a parameter its qualified name.
        inputs: the names of the nodes that it reads, each once.
        value: dtype and shape of its result, such as ``bf16[1, s0, 4096]``; "" if no tensor.
        site: qualified name of the projection that it is, or "".
        arguments: all its arguments as text, nodes by their names.
        module: qualified path of the module that it belongs to; "" if unknown, and of what is
            given to the model rather than held by it; ``amber`` of a factor.
    """

    name: str
    op: str
    target: str
    inputs: tuple[str, ...] = ()
    value: str = ""
    site: str = ""
    arguments: str = ""
    module: str = ""

    @property
    def layer(self) -> str:
        """Path of the layer that the node belongs to, or ""."""
        return layer_path(self.site or self.module)


Sketch = tuple[SketchNode, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A graph at one point of its compilation.

    Attributes:
        name: ``traced``, or the pass that made it so.
        size: its number of nodes.
        packed: its sketch, compressed.
    """

    name: str
    size: int
    packed: bytes = field(repr=False)

    @classmethod
    def of(cls, name: str, sketch: Sketch) -> Stage:
        """Pack ``sketch``."""
        return cls(name, len(sketch), zlib.compress(marshal.dumps(list(map(tuple, sketch))), 1))

    @property
    def sketch(self) -> Sketch:
        """The graph's nodes in execution order."""
        return tuple([SketchNode(*row) for row in marshal.loads(zlib.decompress(self.packed))])

    def to_json(self) -> dict[str, Any]:
        """Return name and size; ``sketch`` has the nodes."""
        return {"name": self.name, "nodes": self.size}


# ---- reading -------------------------------------------------------------------------------------


def layer_path(name: str) -> str:
    """Return the part of a qualified name up to its first number, or "": ``model.layers.0``."""
    match = _LAYER.match(name)
    return match[0] if match else ""


def layers(sketch: Sketch) -> list[str]:
    """Return the paths of the layers of ``sketch`` in execution order."""
    return list(filter(None, dict.fromkeys(node.layer for node in sketch)))


def by_layer(sketch: Sketch) -> dict[str, Sketch]:
    """Return every layer with its nodes, and the rest under ``""``, as :func:`layer` does."""
    nodes = [node for node in sketch if node.op not in INPUTS]
    inputs = {node.name: (at, node) for at, node in enumerate(sketch) if node.op in INPUTS}
    found: dict[str, list[SketchNode]] = {}
    for node in nodes:
        found.setdefault(node.layer, []).append(node)
    whole = {}
    for name, own in found.items():
        read = {inputs[one] for node in own for one in node.inputs if one in inputs}
        whole[name] = (*(node for _, node in sorted(read, key=lambda pair: pair[0])), *own)
    return whole


def layer(sketch: Sketch, name: str) -> Sketch:
    """Return the nodes of one layer, or of any module, and the inputs that they read.

    ``""`` stands for what belongs to no layer.

    Raises:
        OptionError: if no node belongs to ``name``.
    """
    nodes = [node for node in sketch if node.op not in INPUTS]
    if name:
        own = [node for node in nodes if f"{node.site or node.module}.".startswith(f"{name}.")]
    else:
        own = [node for node in nodes if not node.layer]
    if not own and name:
        raise OptionError(choices("layer", name, layers(sketch)))
    read = {one for node in own for one in node.inputs}
    names = {node.name for node in own}
    return tuple(
        node for node in sketch if node.name in names or (node.op in INPUTS and node.name in read)
    )


def lines(sketch: Sketch, within: str = "") -> list[str]:
    """Return a line for each node; names of parameters and sites start below ``within``."""
    labels = {node.name: node.target for node in sketch if node.op in INPUTS}
    start = f"{within}." if within else ""
    labels = {name: target.removeprefix(start) for name, target in labels.items()}
    return [_line(node, labels, start) for node in sketch]


def _line(node: SketchNode, labels: Mapping[str, str], start: str) -> str:
    value = f": {node.value}" if node.value else ""
    if node.op in INPUTS:
        return f"{labels[node.name]}{value} = input"
    arguments = renamed(node.arguments, labels)
    site = f"  # {node.site.removeprefix(start)}" if node.site else ""
    return f"{node.name}{value} = {node.target}({arguments}){site}"


def renamed(arguments: str, names: Mapping[str, str]) -> str:
    """Return the text of some arguments with other names for nodes; strings are no names."""
    return _NAME.sub(lambda word: names.get(word[0], word[0]), arguments)


def diff(before: Sketch, after: Sketch, *, within: str = "", context: int = 3) -> str:
    """Return what changed from ``before`` to ``after`` as a unified text diff."""
    return "\n".join(_diff(before, after, within, context))


def _diff(before: Sketch, after: Sketch, within: str, context: int) -> Iterable[str]:
    from difflib import unified_diff

    return unified_diff(
        lines(before, within), lines(after, within), "before", "after", n=context, lineterm=""
    )
