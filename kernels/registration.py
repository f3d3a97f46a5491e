"""Tell PyTorch about an operator.

    operator = define("name(Tensor x, ...) -> Tensor", reference, fake)

makes ``torch.ops.amber.name``: the reference on every device that no kernel claims (by
``LIBRARY.impl``), shapes from ``fake``, and an error instead of a silently missing gradient.

The plain ``Library`` calls are used because ``torch.library.custom_op`` costs 26 µs a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from amber_compile.errors import AmberError

# Any, and the ignore: torch.library leaves these methods untyped.
LIBRARY: Any = torch.library.Library("amber", "FRAGMENT")  # type: ignore[no-untyped-call]

# The answer depends on no stride, so Inductor need not copy an input into another layout first.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

Answer = TypeVar("Answer", bound=torch.Tensor | tuple[torch.Tensor, ...])


class RegistrationError(AmberError, RuntimeError):
    """The process has Amber's operators already, from elsewhere."""


def define(
    schema: str,
    reference: Callable[..., Answer],
    fake: Callable[..., Answer],
    *tags: torch.Tag,
) -> Callable[..., Answer]:
    """Register an inference operator under ``torch.ops.amber`` and return its overload.

    ``tags`` tell compilers more of it than of the others.

    Raises:
        RegistrationError: if the process has such an operator.
    """
    name = schema.partition("(")[0]
    if hasattr(torch.ops.amber, name):
        raise RegistrationError(
            f"this process has amber::{name} already: it has loaded a library of the operators "
            "(libamber_ops.so). Import amber_compile first; such a library then leaves it its own"
        )
    LIBRARY.define(schema, tags=(*TAGS, *tags))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"amber::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"amber::{name}", _no_gradient(name), lib=LIBRARY)
    overload: Callable[..., Answer] = getattr(torch.ops.amber, name).default
    return overload


def _no_gradient(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            f"amber::{name} is for inference only: it has no gradient. Call the model under "
            "torch.inference_mode() or torch.no_grad(), or train it without Amber"
        )

    return backward
