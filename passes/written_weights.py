"""Leave the projections alone whose weight their own graph writes to.

    w.mul_(0.9);  y = linear(x, w)       ->  dense: what was derived from w before the call is stale

A write through a view counts; what a child graph does is left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule
from torch.multiprocessing.reductions import StorageWeakRef

from amber_compile.graph import storage_of, written
from amber_compile.projection import Projection, fake, value_of

REASON = "the graph writes to its weight"


def refuse_written(gm: GraphModule, projections: Sequence[Projection]) -> list[Projection]:
    """Return ``projections``, with the reason for those whose weight an operator writes to."""
    storages = _storages_written(gm)
    if not storages:  # so that no weight is asked for one that it does not have
        return list(projections)
    return [
        replace(one, unsupported=one.unsupported or REASON)
        if storage_of(fake(one.weight)) in storages
        else one
        for one in projections
    ]


def _storages_written(gm: GraphModule) -> set[StorageWeakRef]:
    nodes = [one for one in gm.graph.nodes if not isinstance(one.target, HigherOrderOperator)]
    values = [value_of(operand) for node in nodes for operand in written(node)]
    return {storage_of(value) for value in values if isinstance(value, torch.Tensor)}
