"""Sums and maxima that are taken in passing: by site and name, whatever the number of tokens.

    statistics.add("model.layers.0.mlp.down_proj", "fisher_x", squares)         float64 sums
    statistics.raise_to("model.layers.0.mlp.down_proj", "absmax", largest)      exact maxima

A NaN stays: a sum or maximum that met one is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from . import distributed

SEPARATOR = "|"
"""Between the parts of a name in a file: no module name holds it."""


class Statistics:
    """What was summed up or maximised so far."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, site: str, name: str, value: Tensor) -> None:
        """Add ``value`` to the sum of this name, in float64."""
        key, value = f"{site}{SEPARATOR}{name}", value.detach().to(dtype=torch.float64)
        held = self._sums.get(key)
        self._sums[key] = value.clone() if held is None else held.add_(value)

    def raise_to(self, site: str, name: str, value: Tensor) -> None:
        """Raise the maximum of this name to ``value``, element by element."""
        key, value = f"{site}{SEPARATOR}{name}", value.detach()
        held = self._maxima.get(key)
        self._maxima[key] = value.clone() if held is None else torch.maximum(held, value)

    def of(self, site: str) -> dict[str, Tensor]:
        """Return what is known of ``site``, by name."""
        start = f"{site}{SEPARATOR}"
        held = {**self._sums, **self._maxima}
        return {key.removeprefix(start): held[key] for key in held if key.startswith(start)}

    def __iter__(self) -> Iterator[str]:
        """Yield the sites in the order in which they were met first."""
        keys = (*self._maxima, *self._sums)
        return iter(dict.fromkeys(key.split(SEPARATOR)[0] for key in keys))

    def joined(self) -> Statistics:
        """Return what all ranks have together."""
        made = Statistics()
        made._sums = distributed.sums(self._sums)
        made._maxima = distributed.maxima(self._maxima)
        return made

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as one flat mapping, for a file."""
        sums = {f"sum{SEPARATOR}{key}": value for key, value in self._sums.items()}
        maxima = {f"max{SEPARATOR}{key}": value for key, value in self._maxima.items()}
        return sums | maxima

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """Read what :meth:`tensors` returned."""
        made = cls()
        for flat, tensor in tensors.items():
            kind, _, key = flat.partition(SEPARATOR)
            (made._sums if kind == "sum" else made._maxima)[key] = tensor
        return made
