"""Leave calls with one token dense in a program that nothing guards against them.

    x [B, S, K], S may be 1, B known      ->   min_tokens = B + 1, compared at run time

Dynamo makes a graph of its own for one token; other programs have one for all calls. Where B is
symbolic as well, a call of two sequences with one token each is told from none with two: it is
dense only if ``min_tokens`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule

from amber_compile.config import AmberConfig
from amber_compile.passes.classify_phase import reshapes_of
from amber_compile.passes.find_projections import find_projections
from amber_compile.projection import fake


def dense_for_one_token(config: AmberConfig, gm: GraphModule) -> AmberConfig:
    """Return ``config`` under which a call of ``gm`` with one token a sequence stays dense."""
    sizes = sequence_sizes(gm)
    batch = sizes[0] if sizes else 1
    if not isinstance(batch, int):
        return config
    return replace(config, min_tokens=max(config.min_tokens, batch + 1))


def sequence_sizes(gm: GraphModule) -> Sequence[int | torch.SymInt] | None:
    """Return batch, sequence and channels of the projection that tells the phase, if one does."""
    projections = [one for one in find_projections(gm) if len(one.shape) == 2]
    origins = [fake(reshapes_of(one.x)[0]) for one in projections]
    return next((origin.shape for origin in origins if origin.dim() == 3), None)
