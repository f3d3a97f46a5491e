"""Qualified names of weights that a graph knows only in part.

A layer that is compiled on its own (``layer.compile(backend="amber")``) and a graph after a graph
break call their weights ``self_attn.q_proj``: the prefix is lost, and all layers may share one
graph. ``register_model`` remembers which weight is whose, so that plans, per-layer rules and
reports work there too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node
from torch.utils.weak import WeakIdKeyDictionary

from .projection import Projection

_CONTAINERS = ("_modules", "_parameters", "_buffers")
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register_model(model: torch.nn.Module) -> None:
    """Remember the qualified name of every parameter of ``model`` (weakly).

    Needed only for models compiled in parts, and before their first compiled call.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"register_model takes a torch.nn.Module, not {type(model).__name__}")
    for name, parameter in model.named_parameters(remove_duplicate=True):
        _names[parameter] = name


def registered_name(weight: torch.Tensor) -> str | None:
    """Return the qualified name of ``weight`` in its registered model, if it has one."""
    name: str | None = _names.get(weight)
    return name


def registered_shapes() -> dict[str, tuple[int, ...]]:
    """Return ``{site name: weight shape}`` of every registered matrix that is still alive."""
    return {
        _owner(name): tuple(weight.shape)
        for weight, name in list(_names.items())
        if weight.dim() >= 2
    }


def owners(
    projections: Sequence[Projection], weights: Sequence[torch.Tensor | None]
) -> list[tuple[str, ...]]:
    """Return the projections' qualified names for each owner that may share their graph.

    The owner of ``weights`` comes first. Others follow where a registered model has further
    modules with weights of the same local names and shapes: its other layers.
    """
    local = [projection.name for projection in projections]
    known = [
        full_name(name, weight) if weight is not None else name
        for name, weight in zip(local, weights, strict=True)
    ]
    prefixed = [at for at, name in enumerate(known) if name != local[at]]
    if not prefixed:
        return [tuple(known)]
    shapes = registered_shapes()
    others = []
    for prefix in _prefixes(local[prefixed[0]], shapes):
        names = [prefix + name if at in prefixed else name for at, name in enumerate(local)]
        if all(shapes.get(names[at]) == shapes[known[at]] for at in prefixed):
            others.append(tuple(names))
    return [tuple(known), *(names for names in others if names != tuple(known))]


def _prefixes(local: str, names: Iterable[str]) -> list[str]:
    return [name.removesuffix(local) for name in names if name.endswith(f".{local}")]


def site_name(node: Node, parameter: Node) -> str:
    """Return the qualified name of the matmul ``node`` that multiplies by ``parameter``.

    The call site's module names it (two modules may share one parameter: ``lm_head`` and the
    embedding); a parameter used straight from a larger module adds its own name.
    """
    module = _module_path(node)
    weight = _parameter_path(parameter)
    parent, _, leaf = weight.rpartition(".")
    inside = parent == module or parent.startswith(f"{module}.") or not module
    name = (parent if leaf == "weight" else weight) if weight and inside else module
    return name.removesuffix(".base_layer") or weight or node.name


def full_name(name: str, weight: torch.Tensor) -> str:
    """Return ``name`` with the prefix that the registered model gives the owner of ``weight``."""
    known = registered_name(weight)
    if known is None:
        return name
    owner = _owner(known)
    return owner if owner == name or owner.endswith(f".{name}") else name


def _owner(parameter: str) -> str:
    """Return the site that a parameter's qualified name belongs to."""
    return parameter.removesuffix(".weight").removesuffix(".base_layer")


def _module_path(node: Node) -> str:
    """Return where the call lies: the innermost module's path below the compiled object."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"^[LG]\['[^']*'\](?:\.|$)", "", path)


def _parameter_path(parameter: Node) -> str:
    """Return the path of a graph input below the compiled object: ``layers.0.q_proj.weight``."""
    if parameter.op == "get_attr":
        return str(parameter.target)
    source = str(getattr(getattr(parameter, "_dynamo_source", None), "name", ""))
    steps = re.findall(r"\.?_(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)", source)
    return ".".join(a or b for a, b in steps if (a or b) not in _CONTAINERS)
