"""Find what of a model may be permuted: trace it, and ask the graph.

    permutable(model, input_ids)     {site: Permutable, or the reason why not}

The model is traced as ``explain`` does it, once, and nothing is compiled. Only a model that is one
graph is looked at: what is behind a graph break might read the same parameters. A cache that
leaves the graph hands out its values, which keeps o_proj as it is: trace with ``use_cache=False``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .binding import Compiled
from .config import AmberConfig
from .naming import registered
from .passes.find_permutations import Permutable, find_permutations
from .passes.find_projections import find_projections
from .tracer import Tracer, _is_whole, _stop


def permutable(
    model: nn.Module, *args: Any, kwargs: Mapping[str, Any] | None = None
) -> dict[str, Permutable | str]:
    """Return for every projection how its input channels may be permuted, or why not.

    Args:
        model: with values, or on the meta device and with inputs there.
        args: positional inputs of the model.
        kwargs: keyword inputs of the model.
    """
    model = getattr(model, "_orig_mod", model)
    first = next(model.parameters(), torch.empty(0))
    tracer = _Tracer(AmberConfig(), first.device)
    with registered(model), torch.no_grad():
        tracer.trace(model, args, dict(kwargs or {}), dynamic=False)
    if len(tracer.found) == 1:
        return tracer.found[0]
    reason = f"the model is traced as {len(tracer.found)} graphs, which may share parameters"
    return {site: reason for found in tracer.found for site in found}


class _Tracer(Tracer):
    """Looks for permutations in place of rewriting."""

    def __init__(self, config: AmberConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.found: list[dict[str, Permutable | str]] = []

    def graph(self, gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Look into one graph, which runs only if there is more to trace behind it."""
        found, reasons = find_permutations(gm, find_projections(gm))
        self.found.append({**reasons, **{one.site: one for one in found}})
        forward: Compiled = gm.forward
        return _stop if _is_whole(gm) else forward
