"""Run dense and sparse side by side and measure what sparsity changes (``check=True``).

At each site the dense product is computed from the same input that the selection reads:

    error = ‖Y - Y'‖₂ / ‖Y‖₂       Y = x Wᵀ,  Y' = select(x) Wᵀ       (Amber Pruner, section 3)
                                   Y' = what the codes give            of a quantised site

and at the end the outputs of the whole dense graph are compared with those of the rewritten one.
Tensors that are no parameters (caches among them) are copied first, and every run meets the same
random numbers: a check leaves no trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves

from .binding import Compiled
from .debug.output_error import relative_error, worse
from .passes.quantize_projections import Product
from .report import GraphReport
from .rewritten import Rewritten


class Checked:
    """A compiled graph that measures itself against the dense one on its first call.

    Args:
        compiled: the rewritten graph, compiled.
        dense: the graph as Dynamo traced it, uncompiled.
        sparse: a rewritten copy of it, uncompiled.
        names: from the projections' names in the graph to those in the report.
        report: where the errors go; of several owners' outputs it holds the largest error.
    """

    def __init__(
        self,
        compiled: Compiled,
        dense: Compiled,
        sparse: Rewritten,
        names: Mapping[str, str],
        report: GraphReport,
    ) -> None:
        self._compiled = compiled
        self._pending: tuple[Compiled, Rewritten] | None = (dense, sparse)
        self._names = names
        self._report = report

    def __call__(self, *arguments: Any) -> Any:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._measure(*pending, arguments)
        return self._compiled(*arguments)

    def _measure(self, dense: Compiled, sparse: Rewritten, arguments: Sequence[Any]) -> None:
        own = len(arguments) - len(sparse.derived)
        runner = _SideBySide(sparse)
        with torch.no_grad(), fork_rng_of(arguments):
            expected = dense(*_copies(arguments[:own]))
        with torch.no_grad(), fork_rng_of(arguments):
            actual = runner.run(*_copies(arguments))
        error = relative_error(tree_leaves(expected), tree_leaves(actual))
        self._report.output_error = worse(error, self._report.output_error)
        errors = {self._names[local]: error for local, error in runner.errors.items()}
        for site in self._report.sites:
            site.error = errors.get(site.name, site.error)


class _SideBySide(Interpreter):
    """Run a rewritten graph; at each site, compute the dense product as well."""

    def __init__(self, rewritten: Rewritten) -> None:
        super().__init__(rewritten.gm, garbage_collect_values=False)
        self._sites = {site.node: (site, selected) for site, selected in rewritten.sites}
        self._products = {product.node: (product, bias) for product, bias in rewritten.products}
        self.errors: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._products:
            product, bias = self._products[n]
            self._note(product.projection.name, self._dense(product, bias), result)
        elif n in self._sites:
            site, selected = self._sites[n]
            kept, self.env[selected] = self.env[selected], self.env[site.x]
            self._note(site.name, super().run_node(n), result)
            self.env[selected] = kept
        return result

    def _dense(self, product: Product, bias: Node | None) -> torch.Tensor:
        """Compute what a quantised product approximates."""
        weight = product.matrix.of(self.env[product.projection.weight])
        added = None if bias is None else self.env[bias]
        return torch.nn.functional.linear(self.env[product.projection.x], weight, added)

    def _note(self, name: str, expected: Any, result: Any) -> None:
        self.errors[name] = worse(relative_error([expected], [result]), self.errors.get(name))


def fork_rng_of(tensors: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Give the random numbers of the CPU, and of the GPUs of ``tensors``, back at the end."""
    devices = {one.device for one in tensors if isinstance(one, torch.Tensor)}
    gpus = sorted(device.index or 0 for device in devices if device.type == "cuda")
    return torch.random.fork_rng(gpus)


def _copies(arguments: Sequence[Any]) -> list[Any]:
    return [
        value.clone()
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
        else value
        for value in arguments
    ]
