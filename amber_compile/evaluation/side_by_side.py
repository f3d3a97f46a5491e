"""One model, called dense and called sparse, with one set of weights.

    with sides(model, {"2:4": config}) as (dense, sparse):
        dense(input_ids=tokens).logits                  the model itself, uncompiled
        sparse["2:4"](input_ids=tokens).logits          its graphs rewritten
        sparse["2:4"].report                            what was rewritten, by then

Inside, the model is in eval mode and needs no gradients. Afterwards its mode, what the process has
compiled and ``last_reports()`` are as they were (undisturbed.py). What the model writes into its
own buffers and attributes stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from amber_compile.config import AmberConfig
from amber_compile.debug.compare import Rewriter, uncompiled
from amber_compile.errors import OptionError, ReleasedError, choices
from amber_compile.fake_model import has_no_values
from amber_compile.inductor import compile_with_inductor, inductor_patches
from amber_compile.naming import registered
from amber_compile.outside import linears_outside
from amber_compile.report import Report
from amber_compile.stand_in import released
from amber_compile.undisturbed import isolated, undisturbed, with_own_code
from amber_compile.variants import Inner

Dense = Callable[..., Any]
BACKENDS: dict[str, Inner] = {"amber_eager": uncompiled, "amber": compile_with_inductor}


class Sparse:
    """A model whose graphs are rewritten; call it as the model is called."""

    def __init__(self, model: nn.Module, rewriter: Rewriter, compiled: Callable[..., Any]) -> None:
        self._model = model
        self._rewriter = rewriter
        self._compiled = compiled

    def __call__(self, **inputs: Any) -> Any:
        """Call the model with these keyword inputs."""
        try:
            return self._compiled(inputs)
        except BackendCompilerFailed as failure:  # Dynamo's wrapping of what was raised
            raise failure.inner_exception from None

    @property
    def report(self) -> Report:
        """What became of every projection in the calls so far."""
        report = Report(self._rewriter.graphs)
        report.outside = linears_outside(self._model, report, self._rewriter.read, None)
        return report


@contextlib.contextmanager
def sides(
    model: nn.Module,
    cases: Mapping[str, AmberConfig],
    *,
    backend: str = "amber_eager",
    dynamic: bool = False,
) -> Iterator[tuple[Dense, dict[str, Sparse]]]:
    """Yield ``model`` as it is, and sparse by each of ``cases``.

    Args:
        model: with values, on any device, compiled or not.
        cases: name -> options of the backend.
        backend: ``"amber_eager"``, or ``"amber"`` for what Inductor generates.
        dynamic: trace once for inputs of all sizes, instead of once for each size.

    Raises:
        OptionError: for another backend, or a model on the meta device.
    """
    if backend not in BACKENDS:
        raise OptionError(choices("backend", backend, BACKENDS))
    model = plain(model)

    def dense(**inputs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return model(**inputs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(registered(model))
        stack.enter_context(_in_eval_mode(model))
        yield (
            dense,
            {
                name: stack.enter_context(_rewritten(model, config, backend, dynamic))
                for name, config in cases.items()
            },
        )


def plain(model: nn.Module) -> nn.Module:
    """Return ``model`` without the wrapper of ``torch.compile``.

    Raises:
        TypeError: if it is no module.
        OptionError: if it lies on the meta device.
        ReleasedError: if the values of its weights were released.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"an evaluation takes a torch.nn.Module, not {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if has_no_values(model):
        raise OptionError("an evaluation runs the model, and its weights hold no values: load them")
    if names := released(model):
        raise ReleasedError(
            f"an evaluation runs the model as it is, and the values of {len(names)} of its weights "
            f"were released (decode=), that of {names[0]} first: load the model again"
        )
    return model


def config_of(options: Mapping[str, Any]) -> AmberConfig:
    """Read the options of the backend.

    ``check`` and ``decode`` change nothing here: dense runs beside sparse, and no weight is freed.

    Raises:
        OptionError: for an unknown option or value.
    """
    return replace(AmberConfig.from_options(None, options), check=False, decode=None)


@contextlib.contextmanager
def _rewritten(
    model: nn.Module, config: AmberConfig, backend: str, dynamic: bool
) -> Iterator[Sparse]:
    if backend == "amber":
        inductor_patches(config)  # an unknown entry is an error now, not at the first call
    rewriter = Rewriter(config, BACKENDS[backend])

    def call(inputs: Mapping[str, Any]) -> Any:
        return model(**inputs)

    with undisturbed(rewriter.graph, []) as own:
        compiled = torch.compile(with_own_code(call), backend=own, dynamic=dynamic, **isolated())
        yield Sparse(model, rewriter, compiled)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards on again wherever it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
