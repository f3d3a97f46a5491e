"""Tell prefill from decode: by the token dimension of the first projection that shows one.

    x [B, S, K]                 S > 1 or symbolic     ->  prefill
    x [B, 1, K]                                       ->  decode: one new token a sequence
    x [T, K], nothing behind it                       ->  unknown: the run-time token count decides

Dynamo gives size 1 a graph of its own, so a symbolic S is never 1. The phase belongs to the graph:
flattened sites (OPT's MLP, experts) and the latent keys of MLA, which span the whole cache even in
decode, cannot be told apart one by one. The *first* site votes, since ``lm_head`` may see the last
token only. Experts never vote: the three dimensions of their input are no batch and no sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from amber_compile.passes.sharded_operands import channels_here
from amber_compile.passes.weight_operand import operation
from amber_compile.projection import Projection, fake

Phase = Literal["prefill", "decode", "unknown"]
RESHAPES = {"view", "reshape", "flatten", "contiguous", "_unsafe_view"}


def classify_phase(projections: Sequence[Projection]) -> Phase:
    """Return the phase of the graph that holds ``projections`` (in execution order)."""
    for projection in projections:
        origin = fake(reshapes_of(projection.x)[0])
        if origin.dim() == 3 and len(projection.shape) == 2:
            return "decode" if statically_known_true(origin.shape[1] == 1) else "prefill"
    return "unknown"


def token_hints(projections: Sequence[Projection]) -> list[int]:
    """Return how many rows the input of each projection has while tracing.

    The first is the number of tokens of the graph; experts have a row per routed token.
    """
    return [_hint(_rows(projection)) for projection in projections]


def fixed_tokens(projections: Sequence[Projection]) -> int | None:
    """Return the number of tokens of the graph, or None where it is symbolic."""
    rows = _rows(projections[0])
    return rows if isinstance(rows, int) else None


def _rows(projection: Projection) -> int | torch.SymInt:
    """Return the tokens of the input, in rows or columns.

    Not by ``Size.numel``, which fixes every symbolic size.
    """
    elements: int | torch.SymInt = math.prod(fake(projection.x).shape)
    return elements // channels_here(projection)


def _hint(size: int | torch.SymInt) -> int:
    """Return ``size``, or the value it had while tracing, or 1 if it has none (unbacked)."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return int(hint) if isinstance(hint, int) else 1
    return size


def reshapes_of(x: Node) -> list[Node]:
    """Return ``[origin, view, ..., x]``: ``x`` followed back through reshapes that keep its rows.

    The walk ends at the first tensor of three dimensions whose last one is that of ``x``.
    """
    chain = [x]
    while fake(chain[0]).dim() != 3 and _is_reshape(chain[0]):
        source = chain[0].args[0]
        if not isinstance(source, Node) or fake(source).shape[-1] != fake(x).shape[-1]:
            break
        chain.insert(0, source)
    return chain


def _is_reshape(node: Node) -> bool:
    return node.op in ("call_method", "call_function") and operation(node) in RESHAPES
