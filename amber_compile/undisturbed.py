"""Use Dynamo to look at code, and leave it as it was found.

What Dynamo compiles stays with the code objects of the model, and what it learns stays with their
line numbers. A trace that nobody will run must not count among a function's recompilations, teach
Dynamo that a size varies, hold on to graphs, or add to the process's list of graph breaks. For a
trace the settings that would keep Dynamo from tracing are suspended: ``set_stance``, ``disable``
and ``suppress_errors``.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.utils import graph_break_reasons
from torch.fx import GraphModule

from .breaks import Break

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
SETTINGS = {
    "automatic_dynamic_shapes": False,
    "suppress_errors": False,
    "disable": False,
    "recompile_limit": 1 << 20,  # counts the user's own recompilations too before PyTorch 2.13
    "accumulated_recompile_limit": 1 << 20,
}


@contextlib.contextmanager
def undisturbed(explain: Backend, breaks: list[Break]) -> Iterator[Backend]:
    """Give a backend that hands graphs to ``explain``, and forget all that it compiled.

    Every graph break is added to ``breaks``.
    """
    held: list[Callable[..., Any]] = [explain]  # Dynamo keeps backends and what they return

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        at = len(held)
        held.append(held[0](gm, inputs))
        return lambda *arguments: held[at](*arguments)

    codes: list[types.CodeType] = []
    hook = register_bytecode_hook(lambda code, _: codes.append(code))
    before = len(graph_break_reasons)
    try:
        with torch._dynamo.config.patch(SETTINGS), torch.compiler.set_stance("default"):
            yield backend
    finally:
        hook.remove()
        held.clear()
        for code in codes:
            _forget(code, backend)
        breaks += [Break.of(cause) for cause in graph_break_reasons[before:]]
        del graph_break_reasons[before:]


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of ``function`` whose code is its own: what is compiled of it goes with it."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def isolated() -> dict[str, Any]:
    """Return what has ``torch.compile`` count its recompilations apart, where it can."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def _forget(code: types.CodeType, backend: Backend) -> None:
    """End the entries of ``code`` that ``backend`` compiled, and let go of what they hold."""
    for entry in _debug_get_cache_entry_list(code):
        guards = entry.guard_manager
        own = getattr(entry.backend, "compiler_fn", entry.backend) is backend
        if own and guards is not None and guards.extra_state is not None:
            guards.extra_state.invalidate(entry, DeletedGuardManagerWrapper("only explained"))
