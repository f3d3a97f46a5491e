"""See every product of a model with a weight while it runs, and answer it differently.

    with observing(weights_of(model, names), visit):
        model(batch)                        # visit(call) -> Tensor: what the product shall be

No hook, no patch: a mode of PyTorch's own sees the functions that Python calls, and knows a weight
by the memory it lies in, so that views and transposes of it are known as well. When it ends,
nothing is left: neither the model nor its modules were touched.

    linear(x, w, b)    matmul(x, w.t())    addmm(b, x, w)    _grouped_mm(x, w, offs=...)

Products with a part of a weight, or with something computed from it, are not seen; nor are those
that the backend cannot rewrite (they have no name in ``names``).

Gradients are taken in passing, by an identity on the way back:

    y' = tapped(y, anchor, seen)      seen(gradient of y), when autograd.grad(loss, anchor) runs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from amber_compile.naming import module_site

Place = tuple[int, int, int]
"""Where a tensor lies: address of its storage, offset in it, and number of elements."""
Visit = Callable[["Call"], Tensor]
"""Returns what a product shall be; ``call()`` is what it is."""

WEIGHT_AT = {
    **dict.fromkeys(("linear", "matmul", "mm", "__matmul__", "_grouped_mm", "grouped_mm"), 1),
    **dict.fromkeys(("addmm",), 2),
}
"""Position of the weight among the arguments of a product; that of x comes before it."""
WEIGHT_NAMES = ("weight", "mat2", "other")
X_NAMES = ("input", "mat1", "self")
STORED_NK = ("linear",)
"""Products whose weight argument is [N, K]; that of the others is [K, N]."""


@dataclass(frozen=True)
class Call:
    """One product as a model runs it.

    Attributes:
        name: of the site.
        x: activations ``[..., K]``.
        weight: ``[N, K]`` or ``[E, N, K]``: a view of the parameter, without gradient.
        offsets: where the rows of each expert end, for ``[E, N, K]``.
        again: ``again(x, weight)`` is the product of others, bias and all.
    """

    name: str
    x: Tensor
    weight: Tensor
    offsets: Tensor | None
    again: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Return the product, of another ``x`` or by another ``weight`` [N, K] if given."""
        return self.again(self.x if x is None else x, self.weight if weight is None else weight)

    @property
    def rows(self) -> Tensor:
        """``x`` as ``[tokens, K]``."""
        return self.x.reshape(-1, self.x.shape[-1])


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters of the sites ``names``; a name without one, or with one that an
    earlier name has, is left out.
    """
    wanted, taken = set(names), set[Place]()
    found: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        for name in (module_site(path.removesuffix(".weight")), module_site(path)):
            if name in wanted and name not in found and _place(parameter) not in taken:
                found[name] = parameter
                taken.add(_place(parameter))
    return found


class observing(TorchFunctionMode):  # reads as a verb in `with observing(...)`
    """Hand every product with one of ``weights`` to ``visit``, while the context lasts.

    Args:
        weights: by site name, as :func:`weights_of` has them.
        visit: takes a :class:`Call`, returns what the product shall be.
    """

    def __init__(self, weights: Mapping[str, Tensor], visit: Visit) -> None:
        super().__init__()
        self._names = {_place(weight): name for name, weight in weights.items()}
        self._visit = visit

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        at = WEIGHT_AT.get(getattr(func, "__name__", ""))
        if at is None:
            return func(*args, **(kwargs or {}))
        product = _Product(func, tuple(args), dict(kwargs or {}), at)
        x, weight = product.x, product.weight
        name = self._names.get(_place(weight)) if isinstance(weight, Tensor) else None
        if name is None or not isinstance(x, Tensor):
            return func(*args, **(kwargs or {}))
        return self._visit(product.call(name, x, weight))


@dataclass(frozen=True)
class _Product:
    """A function that multiplies, with its arguments."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int

    @property
    def x(self) -> Any:
        return self._get(self.at - 1, X_NAMES)

    @property
    def weight(self) -> Any:
        return self._get(self.at, WEIGHT_NAMES)

    def call(self, name: str, x: Tensor, weight: Tensor) -> Call:
        straight = self.func.__name__ in STORED_NK
        seen = weight.detach()

        def again(x: Tensor, weight: Tensor) -> Tensor:
            operand = weight if straight else weight.transpose(-1, -2)
            changed = self._with(self.at - 1, X_NAMES, x)._with(self.at, WEIGHT_NAMES, operand)
            result: Tensor = changed.func(*changed.args, **changed.kwargs)
            return result

        nk = seen if straight else seen.transpose(-1, -2)
        return Call(name, x, nk, self.kwargs.get("offs"), again)

    def _get(self, at: int, names: Sequence[str]) -> Any:
        if at < len(self.args):
            return self.args[at]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)

    def _with(self, at: int, names: Sequence[str], value: Tensor) -> _Product:
        if at < len(self.args):
            return replace(self, args=(*self.args[:at], value, *self.args[at + 1 :]))
        name = next(name for name in names if name in self.kwargs)
        return replace(self, kwargs={**self.kwargs, name: value})


def _place(tensor: Tensor) -> Place:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


# ---- gradients -----------------------------------------------------------------------------------


def tapped(value: Tensor, anchor: Tensor, seen: Callable[[Tensor], None]) -> Tensor:
    """Return ``value``; on the way back ``seen`` is called with its gradient.

    ``anchor`` is a scalar that requires gradients and changes nothing: with it as the only input
    of ``torch.autograd.grad`` no gradient of a weight is computed, and none is stored.
    """
    apply: Any = _Tap.apply  # which torch leaves untyped
    result: Tensor = apply(value, anchor, seen)
    return result


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, seen: Callable[[Tensor], None]) -> Tensor:
        ctx.seen = seen
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.seen(gradient)
        return gradient, gradient.new_zeros(()), None
