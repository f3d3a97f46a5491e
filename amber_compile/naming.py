"""Qualified names of weights, as far as a graph knows them, and beyond.

A graph knows where a weight lies below the object that was compiled (``L['self']`` here):

    L['self']._modules['layers']._modules['0']._parameters['weight']      ->  layers.0.weight

A layer that is compiled on its own (``layer.compile(backend="amber")``) and a graph after a graph
break call their weights ``self_attn.q_proj``: the prefix is lost, and all layers may share one
graph. ``register_model`` remembers which weight is whose, so that plans, per-layer rules and
reports work there too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.utils.weak import WeakIdKeyDictionary

from .gathered import source_of
from .locking import lock
from .projection import Projection

_STEP = re.compile(r"""\.([^.\[\]]+)|\[(?:'([^']*)'|"([^"]*)"|(\d+))\]""")
PARAMETER = "amber_parameter"
"""Key in the ``meta`` of a node that is a weight: its qualified name, "" if that is not known."""
_UNNAMED = ("_modules", "_parameters", "_buffers", "_orig_mod", "__dict__")
"""Steps on the way to a weight that are no part of its name."""
_ITSELF = ".forward.__self__"
"""A step from a module to itself, where its ``forward`` was set on the instance."""


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a registered weight lives: the number of its model, and its qualified name there."""

    model: int
    name: str


_homes: MutableMapping[torch.Tensor, _Home] = WeakIdKeyDictionary()
_numbers = itertools.count()


def register_model(model: torch.nn.Module) -> None:
    """Remember the qualified name of every parameter of ``model`` (weakly).

    Needed only for models compiled in parts, and before their first compiled call.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"register_model takes a torch.nn.Module, not {type(model).__name__}")
    number = next(_numbers)
    with lock:
        for name, parameter in model.named_parameters(remove_duplicate=True):
            _homes[parameter] = _Home(number, _without_wrappers(name))


@contextlib.contextmanager
def registered(model: torch.nn.Module) -> Iterator[None]:
    """Name weights as in ``model``, and forget it afterwards: names given before come back."""
    before = [(parameter, _homes.get(parameter)) for parameter in model.parameters()]
    register_model(model)
    try:
        yield
    finally:
        with lock:
            for parameter, home in before:
                if home is None:
                    _homes.pop(parameter, None)
                else:
                    _homes[parameter] = home


def module_site(name: str) -> str:
    """Return the site that the module of this qualified name is: LoRA's base layer is its owner."""
    return _without_wrappers(name).removesuffix(".base_layer")


def registered_shapes(weight: torch.Tensor | None) -> dict[str, tuple[int, ...]]:
    """Return ``{site name: shape}`` of every live matrix of the registered model of ``weight``."""
    home = _home(weight)
    if home is None:
        return {}
    with lock:  # another thread may register its model
        found = list(_homes.items())
    return {
        _owner(other.name): tuple(matrix.shape)
        for matrix, other in found
        if other.model == home.model and matrix.dim() >= 2
    }


def owners(
    projections: Sequence[Projection], weights: Sequence[torch.Tensor | None]
) -> list[tuple[str, ...]]:
    """Return the projections' qualified names for each owner that may share their graph.

    The owner of ``weights`` comes first. Others follow where its registered model has further
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
    first = prefixed[0]
    shapes = registered_shapes(weights[first])
    prefixed = [at for at in prefixed if _same_model(weights[at], weights[first])]
    found = [tuple(known)]
    for prefix in _prefixes(local[first], shapes):
        names = [prefix + local[at] if at in prefixed else name for at, name in enumerate(known)]
        fits = all(shapes.get(names[at]) == shapes[known[at]] for at in prefixed)
        if fits and tuple(names) not in found:
            found.append(tuple(names))
    return found


def site_name(node: Node, parameter: Node) -> str:
    """Return the qualified name of the matmul ``node`` that multiplies by ``parameter``.

    The call site's module names it (two modules may share one parameter: ``lm_head`` and the
    embedding); a parameter used straight from a larger module adds its own name.
    """
    module = module_path(node)
    weight = parameter_path(parameter)
    parent, _, leaf = weight.rpartition(".")
    inside = parent == module or parent.startswith(f"{module}.") or not module
    name = (parent if leaf == "weight" else weight) if weight and inside else module
    name = re.sub(r"\.?parametrizations\.\w+\.original\d*$", "", name)
    return name.removesuffix(".base_layer") or module or weight or node.name


def full_name(name: str, weight: torch.Tensor) -> str:
    """Return ``name`` with the prefix that the registered model gives the owner of ``weight``."""
    home = _home(weight)
    if home is None:
        return name
    owner = _owner(home.name)
    own = any(full == name or full.endswith(f".{name}") for full in (owner, home.name))
    return owner if own else name


def _home(weight: torch.Tensor | None) -> _Home | None:
    return None if weight is None else _homes.get(source_of(weight))


def _same_model(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    homes = _home(one), _home(other)
    return homes[0] is not None and homes[1] is not None and homes[0].model == homes[1].model


def _prefixes(local: str, names: Iterable[str]) -> list[str]:
    return [name.removesuffix(local) for name in names if name.endswith(f".{local}")]


def _without_wrappers(name: str) -> str:
    """Return a qualified name without the steps that compiled modules and containers add."""
    return ".".join(step for step in name.split(".") if step not in _UNNAMED)


def _owner(parameter: str) -> str:
    """Return the site that a parameter's qualified name belongs to."""
    return parameter.removesuffix(".weight").removesuffix(".base_layer")


def module_path(node: Node) -> str:
    """Return where the call lies: the innermost module's path below the compiled object."""
    stack = node.meta.get("nn_module_stack") or {}
    source = str(list(stack.values())[-1][0]) if stack else ""
    return _path(source) if "[" in source else _without_wrappers(source)  # export gives names


def parameter_path(parameter: Node) -> str:
    """Return the path of a graph input below the compiled object: ``layers.0.q_proj.weight``."""
    if PARAMETER in parameter.meta:
        return _without_wrappers(str(parameter.meta[PARAMETER]))
    if parameter.op == "get_attr":
        return str(parameter.target)
    source = str(getattr(getattr(parameter, "_dynamo_source", None), "name", ""))
    return _path(source) or ".".join(_steps(source)[:1])


@functools.lru_cache(maxsize=4096)  # all nodes of a module repeat it
def _path(source: str) -> str:
    """Return the dotted path of an expression by which Dynamo reads a module or tensor.

    The variable it starts from is named only where it is a container of several: ``L['self'].q``
    is ``q``, ``G['layers'][0].q`` is ``layers.0.q``.
    """
    steps = _steps(source)
    is_container = re.match(r"[LG]\[[^\]]*\]\[", source)
    return ".".join(steps if is_container else steps[1:])


def _steps(source: str) -> list[str]:
    """Return the names and indices in ``source``, that of the variable first."""
    found = _STEP.finditer(source.replace(_ITSELF, ""))
    steps = ("".join(match.groups(default="")) for match in found)
    return [step for step in steps if step not in _UNNAMED]
