"""Tell Inductor that what ``amber::derive(..., copy=False)`` returns is not its own.

    buf1 = derive(w, "...", False)      ->      buf1 is read, and never given to another result

Inductor reuses the memory of what an operator returned, once nobody reads it any more. A tensor
that is looked up in each call is kept for the next one, so it would have to be a copy: of every
code of a quantised model, a fifth of a prefill of 512 tokens.
"""

from __future__ import annotations

from typing import Any

import torch

import amber_compile.derive_operator  # noqa: F401  # registers torch.ops.amber.derive

_own: list[Any] = []
"""How Inductor lowers the operator, once it is registered."""


def share_with_inductor() -> None:
    """Register how Inductor lowers the operator; it may have made a way of its own before."""
    from torch._inductor import lowering
    from torch._inductor.virtualized import V

    operator = torch.ops.amber.derive.default
    if operator in lowering.lowerings and lowering.lowerings[operator] in _own:
        return
    handler: Any = lowering.fallback_handler
    call = handler(operator, add_to_fallback_set=False)

    def derive(weight: Any, request: str, copy: bool = True) -> Any:
        made = call(weight, request, copy)
        if not copy:
            V.graph.never_reuse_buffers.add(made.get_name())
        return made

    lowering.register_lowering(operator, type_promotion_kind=None)(derive)
    _own[:] = [lowering.lowerings[operator]]
