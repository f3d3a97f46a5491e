"""Release the values of weights that every graph multiplies by in eight bits (``decode="int8"``).

    W [N, K] in 2 or 4 bytes a weight   ->   codes in 1 byte, scales; W itself holds NaN, shared

A weight is released when the first graph that has its codes is bound to it, and if no graph reads
its values: none so far (``read``), and none of this model later, for its sites are decided alike in
prefill and in decode. Tied embeddings keep theirs. Codes, scales and score factors are then kept
as long as the weight lives, whatever becomes of the graphs.

From then on its values are gone: eager calls, other backends and saved files see NaN. ``restore``
puts codes · scales in their place, which is what the graphs multiply by; the next compiled call
releases them again, and multiplies by the same codes.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from .derivations import Derivation, WeightScale
from .derived import derive, kept, move
from .errors import ReleasedError
from .gathered import source_of
from .graph import positions
from .locking import lock
from .passes.weight_operand import is_parameter
from .projection import value_of
from .rebuild import needs_values, whole
from .stand_in import empty, is_released, trim
from .weight_codes import dequantize_weight

_readers: MutableMapping[torch.Tensor, WeakSet[Any]] = WeakIdKeyDictionary()
"""The graphs that read the values of a weight."""


def matrices_read(gm: GraphModule) -> tuple[int, ...]:
    """Return the argument positions of the weights whose values some node of ``gm`` reads."""
    return tuple([at for node, at in positions(gm).items() if node.users and _is_matrix(node)])


def read(weights: Iterable[torch.Tensor], reader: object) -> None:
    """Note that the graph ``reader`` reads the values of ``weights``: they are not released.

    Raises:
        ReleasedError: if one is already.
    """
    with lock:
        for weight in weights:
            refuse_released([weight])
            _readers.setdefault(weight, WeakSet()).add(reader)


def refuse_released(weights: Iterable[Any]) -> None:
    """Refuse to read a weight that holds no values.

    Raises:
        ReleasedError: naming its shape.
    """
    for weight in weights:
        if isinstance(weight, torch.Tensor) and is_released(weight):
            raise ReleasedError(
                f"the values of a weight {list(weight.shape)} were released (decode=), and this "
                "graph reads them. Name its projection in quantize_skip=, or compile without "
                "decode=; for this process, call amber_compile.restore(model) first"
            )


def release(weight: torch.Tensor, also: Sequence[Derivation] = ()) -> str | None:
    """Release the values of ``weight``; return why they are kept, if they are.

    ``also`` is derived first: what graphs that are not compiled yet may ask for.
    """
    with lock:
        if is_released(weight):
            return None
        if source_of(weight) is not weight:
            return "FSDP gathers it for each pass"
        if any(_readers.get(weight, ())):
            return "another graph reads its values"
        plain = [one for one in kept(weight) if isinstance(one, WeightScale) and one.outputs]
        for one in (*also, *(WeightScale(scale.quantized) for scale in plain)):
            derive(weight, one)
        lasting = [one for one in kept(weight) if needs_values(one)]
        move(weight, lambda: empty(weight), lasting)
        trim()
        return None


def restore(model: torch.nn.Module) -> int:
    """Give the released weights of ``model`` values again: codes · scales. Return how many.

    These are not the values that the model came with: each is within half a step of its row's
    scale. To get those, load the model again. The next compiled call releases them once more.

    Raises:
        TypeError: if ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore takes a torch.nn.Module, not {type(model).__name__}")
    found = [weight for weight in model.parameters() if is_released(weight)]
    for weight in found:
        with lock, torch.inference_mode(weight.is_inference()), torch.no_grad():
            _restore(weight)
            trim()
    return len(found)


def _restore(weight: torch.Tensor) -> None:
    of_weight = whole(weight, kept(weight, written=True))
    assert of_weight is not None, "a released weight keeps all its codes"
    quantized, codes, scale = of_weight
    smooth = quantized.smooth.compute(weight) if quantized.smooth else None
    values = torch.empty_like(weight)
    dequantize_weight(quantized.matrix.of(values), codes, scale, smooth)

    def change() -> None:
        weight.data = values

    move(weight, change)


def _is_matrix(node: torch.fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and is_parameter(node)
