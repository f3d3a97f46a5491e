"""One projection in a report: what it is, what became of it, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .debug.output_error import number
from .decision import Decision


@dataclass
class Site:
    """One projection of a graph and what became of it.

    Attributes:
        name: qualified name of the call site.
        shape: of its weight, ``(N, K)`` or ``(E, N, K)``.
        macs: multiply-accumulates per token (experts: per routed token and active expert).
        operator: how the graph spells it.
        decision: sparse with which settings, or dense for which reason; quantised, or why not.
        role: what its name says it is: ``q``, ``gate``, ``down``, ``head`` ...
        share: part of its outputs that reads a sparse activation, 0 to 1.
        kernel: what runs its selection and quantisation, and its product if that is quantised.
        error: relative output error ‖Y - Y'‖ / ‖Y‖ on the first call, under ``check=True``.
        weight_bytes: size of its weight as the model has it.
        code_bytes: size of its quantised weight and scales, 0 if it is not quantised.
        released: the values of its weight were given up for the codes (``decode=``).
        smoothing: where its smooth vector is applied; "" if it has none.
    """

    name: str
    shape: tuple[int, ...]
    macs: float
    operator: str
    decision: Decision
    role: str = "unknown"
    share: float = 0.0
    kernel: str = ""
    error: float | None = None
    weight_bytes: int = 0
    code_bytes: int = 0
    released: bool = False
    smoothing: str = ""

    @property
    def level(self) -> int:
        """How much was done to it: 2 if it is sparse, 1 if it is quantised only."""
        return 2 if self.decision.sparse else int(self.decision.rewritten)

    @property
    def format(self) -> str:
        """In what its product is computed, and how it is smoothed; "" if nobody asked."""
        if self.decision.quantization is not None:
            return str(self.decision.quantization)
        bits = 8 * self.weight_bytes // math.prod(self.shape) or 16
        return f"{bits} bit" if self.decision.unquantized else ""

    def called_again(self, other: Site) -> Site:
        """Return the site of a projection that the graph calls a second time, as ``other``."""
        macs = self.macs + other.macs
        shared = self.macs * self.share + other.macs * other.share
        shown = self if self.level >= other.level else other
        return replace(shown, macs=macs, share=shared / macs if macs else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the site as plain JSON values: ``sparse`` are its settings, or None."""
        settings, quantization = self.decision.settings, self.decision.quantization
        return {
            **{name: value for name, value in vars(self).items() if name != "decision"},
            "shape": list(self.shape),
            "sparse": settings.to_json() if settings else None,
            "dense": self.decision.reason,
            "obstacle": self.decision.obstacle,
            "quantized": quantization.to_json() if quantization else None,
            "unquantized": self.decision.unquantized,
            "unquantized_obstacle": self.decision.unquantized_obstacle,
            "error": number(self.error),
        }
