"""Write what is derived from a weight as text, for a graph that cannot be given further inputs.

    ScoreFactor("weight_norm", Matrix(True))
        <->  {"is": "ScoreFactor", "score": "weight_norm", "matrix": {"is": "Matrix", ...}}

The text is the whole request, so that a process that finds a compiled graph in a cache can answer
it. Tensors of a plan are named by their id: whoever reads the text must have loaded the plan.
"""

from __future__ import annotations

import functools
import json
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch

from .derivations import (
    Calibrated,
    Derivation,
    Matrix,
    Quantized,
    ScaledVector,
    ScoreFactor,
    WeightCodes,
    WeightScale,
)
from .errors import PlanError
from .plan_tensors import PlanTensors
from .quantization import Quantization

KINDS = {
    kind.__name__: kind
    for kind in (Calibrated, Matrix, Quantized, ScaledVector, ScoreFactor, WeightCodes, WeightScale)
} | {"Quantization": Quantization}

_loaded: dict[str, PlanTensors] = {}
"""The tensors that a text may name, by id; a mapped file takes no memory until one is asked for."""


def keep(tensors: PlanTensors) -> None:
    """Let texts name ``tensors`` from now on."""
    _loaded.setdefault(tensors.id, tensors)


def to_text(request: Derivation) -> str:
    """Return ``request`` as text; the plan that it reads is kept for it."""
    return json.dumps(_plain(request), separators=(",", ":"))


@functools.lru_cache(maxsize=65536)  # asked for on every call of a graph
def from_text(text: str) -> Derivation:
    """Return the request that ``text`` is.

    Raises:
        PlanError: if it names tensors of a plan that this process has not loaded.
    """
    return cast("Derivation", _value(json.loads(text)))


def _plain(value: Any) -> Any:
    if isinstance(value, PlanTensors):
        keep(value)
        return {"tensors": value.id}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if is_dataclass(value):
        held = {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
        return {"is": type(value).__name__, **held}
    return value


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return tuple(_value(one) for one in plain)
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"tensors"}:
        return _tensors(plain["tensors"])
    if plain.keys() == {"dtype"}:
        return getattr(torch, plain["dtype"])
    held = {name: _value(one) for name, one in plain.items() if name != "is"}
    return KINDS[plain["is"]](**held)


def _tensors(name: str) -> PlanTensors:
    if name not in _loaded:
        raise PlanError(
            f"a compiled graph reads the tensors {name!r} of a plan that this process has not "
            "loaded; give the same plan to the pass that it was compiled with, or Plan.load it"
        )
    return _loaded[name]
