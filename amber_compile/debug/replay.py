"""Call a model again and again from the same state, dense or through a backend.

    call = Call(model, args, kwargs)
    call.dense()               the model as it is, uncompiled
    call.through(backend)      traced by Dynamo, each graph compiled by ``backend``
    call.traced(backend)       the same, to be called more often than traced

Every call meets copies of the inputs (a cache is written once, and not the user's), the same random
numbers and the buffers as they were. Nothing is left in Dynamo's caches (undisturbed.py). What the
model writes into other attributes of its modules stays.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from amber_compile.binding import Compiled
from amber_compile.breaks import Break
from amber_compile.checked import fork_rng_of
from amber_compile.errors import OptionError, ReleasedError
from amber_compile.fake_model import has_no_values
from amber_compile.stand_in import released
from amber_compile.undisturbed import isolated, undisturbed, with_own_code

Backend = Callable[[GraphModule, Sequence[Any]], Compiled]


class Call:
    """A call of ``model`` that can be repeated.

    Args:
        model: with values, on any device, compiled or not.
        args: positional inputs.
        kwargs: keyword inputs.
        caller: the function that the user called, for errors.

    Raises:
        TypeError: if ``model`` is no module.
        OptionError: if it lies on the meta device.
        ReleasedError: if the values of its weights were released.

    Attributes:
        model: what is called, without the wrapper of ``torch.compile``.
        breaks: every graph break so far.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        caller: str = "check",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller} takes a torch.nn.Module, not {type(model).__name__}")
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile(model)
        if has_no_values(self.model):
            raise OptionError(
                f"{caller} runs the model, and its weights hold no values (meta device): "
                "load them first, or use amber_compile.explain"
            )
        if names := released(self.model):
            raise ReleasedError(
                f"{caller} runs the model as it is, and the values of {len(names)} of its weights "
                f"were released (decode=), that of {names[0]} first: load the model again"
            )
        self._inputs = tuple(args), dict(kwargs or {})
        self.breaks: list[Break] = []

    def dense(self) -> Any:
        """Return the output of the model itself."""
        with self._fresh() as (args, kwargs), torch.compiler.set_stance("force_eager"):
            return self.model(*args, **kwargs)

    def through(self, backend: Backend) -> Any:
        """Return the output of the model with every graph compiled by ``backend``."""
        with self.traced(backend) as run:
            return run()

    @contextlib.contextmanager
    def traced(self, backend: Backend) -> Iterator[Callable[[], Any]]:
        """Yield what calls the model through ``backend``: Dynamo traces it in the first call."""
        model = self.model

        def call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            return model(*args, **kwargs)

        def run() -> Any:
            with self._fresh() as inputs:
                try:
                    return compiled(*inputs)
                except BackendCompilerFailed as failure:  # Dynamo's wrapping of what was raised
                    raise failure.inner_exception from None

        own = with_own_code(call)
        with undisturbed(backend, self.breaks) as forgotten:
            compiled = torch.compile(own, backend=forgotten, dynamic=False, **isolated())
            yield run

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        args, kwargs = self._copied(tensors)
        with torch.no_grad(), fork_rng_of(tensors), _buffers_kept(self.model):
            yield args, kwargs

    def _copied(self, held: Sequence[torch.Tensor]) -> Any:
        """Return a copy of the inputs; the model and its own tensors stay themselves."""
        known: dict[int, Any] = {id(one): one for one in (self.model, *held)}
        for leaf in tree_leaves(self._inputs):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:  # refuses to be deep-copied
                known.setdefault(id(leaf), leaf.detach().clone())
        return copy.deepcopy(self._inputs, known)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its buffers back, with the values that they had."""
    own = [(module, dict(module._buffers)) for module in model.modules()]
    values = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for module, buffers in own:
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values.items():
            if not torch.equal(buffer, value):
                buffer.copy_(value)
