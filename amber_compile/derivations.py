"""What a rewritten graph is given beside its own inputs: tensors that follow from a weight.

| derivation    | tensor                                                  | shape, dtype          |
|---------------|---------------------------------------------------------|-----------------------|
| `ScoreFactor` | one number a channel, to score activations by           | [K] or [E, K], fp32   |
| `Calibrated`  | what the plan holds for the projection of the weight    | as the plan has it    |
| `WeightCodes` | the weight in int8 or fp8, prepared for its product     | of its device         |
| `WeightScale` | what a code of each row is worth                        | [N], fp32             |
| `ScaledVector` | a norm's weight or a bias times a smooth vector        | [K], as the graph has |

A derivation is a frozen value: two that are equal give one input. ``compute`` makes the tensor from
the weight at hand; ``like`` an empty one of its shape, type and device, from a fake weight; ``at``
is the same derivation for the same place in another layer, whose projections have other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from .errors import OptionError, PlanError
from .kernels.quantized_linear import prepare_weight, prepared_like
from .plan_tensors import PlanTensors
from .quantization import Quantization
from .scores import SCORES
from .weight_codes import quantize_weight

Names = Mapping[str, str]


class Derivation(Protocol):
    """A tensor that follows from a weight.

    Attributes:
        lasting: it is small, so it is kept as long as its weight lives; otherwise as long as a
            compiled graph reads it.
    """

    lasting: ClassVar[bool]

    def compute(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the tensor for the real ``weight``."""

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        """Return an empty tensor of the same shape, dtype and device."""

    def at(self, names: Names) -> Derivation:
        """Return the same for the projections of other names."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """The part of a stored weight that a projection multiplies by: ``[N, K]`` or ``[E, N, K]``.

    Attributes:
        transposed: K is stored before N.
        start: the first of its rows.
        stop: where its rows end; None: at the last.
    """

    transposed: bool = False
    start: int = 0
    stop: int | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the matrix as a view."""
        matrix = weight.detach().transpose(-1, -2) if self.transposed else weight.detach()
        return matrix[..., self.start : self.stop, :]


@dataclass(frozen=True, slots=True)
class ScoreFactor:
    """The factor of a score that follows from the weight alone."""

    lasting: ClassVar[bool] = True
    score: str
    matrix: Matrix = Matrix()

    def compute(self, weight: torch.Tensor) -> torch.Tensor:
        """Return fp32 [K], or [E, K] with one factor per expert."""
        function = SCORES[self.score]
        assert function is not None, f"score {self.score!r} has no factor"
        matrix = self.matrix.of(weight)
        if matrix.dim() == 3:
            return torch.stack([function(expert) for expert in matrix])
        return function(matrix)

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        """Return an empty factor."""
        shape = (*weight.shape[:-2], weight.shape[-2 if self.matrix.transposed else -1])
        return weight.new_empty(shape, dtype=torch.float32, requires_grad=False)

    def at(self, names: Names) -> ScoreFactor:
        """Return itself: it follows from the weight alone."""
        return self


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A tensor of the plan, moved to where the weight is.

    Attributes:
        site: the projection it belongs to.
        name: which of its tensors.
        tensors: all that the plan has.
        shape: of the tensor.
        dtype: what the graph wants.
    """

    lasting: ClassVar[bool] = False
    site: str
    name: str
    tensors: PlanTensors
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def compute(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the tensor.

        Raises:
            PlanError: if the plan has none, or one of another shape.
        """
        found = self.tensors.get(self.site, self.name)
        if found is None or tuple(found.shape) != self.shape:
            has = "none" if found is None else f"one of shape {list(found.shape)}"
            raise PlanError(
                f"{self.site} needs the tensor {self.name!r} {list(self.shape)}; the plan has {has}"
            )
        return found.to(weight.device, self.dtype).contiguous()

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        """Return an empty tensor."""
        return weight.new_empty(self.shape, dtype=self.dtype, requires_grad=False)

    def at(self, names: Names) -> Calibrated:
        """Return the tensor of the same name of another projection."""
        return replace(self, site=names.get(self.site, self.site))


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight to be quantised.

    Attributes:
        quantization: how.
        matrix: which part of the stored weight.
        smooth: what the activations are multiplied by, and so the weight divided by.
        source: what the plan has instead of the weight.
    """

    quantization: Quantization
    matrix: Matrix = Matrix()
    smooth: Calibrated | None = None
    source: Calibrated | None = None

    def compute(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes [N, K] and scales fp32 [N].

        Raises:
            OptionError: if the weight is not finite.
        """
        smooth = self.smooth.compute(weight) if self.smooth else None
        matrix = self.source.compute(weight) if self.source else self.matrix.of(weight)
        return quantize_weight(matrix, self.quantization.dtype, smooth)

    def at(self, names: Names) -> Quantized:
        """Return that of another projection."""
        smooth = self.smooth.at(names) if self.smooth else None
        return replace(self, smooth=smooth, source=self.source.at(names) if self.source else None)


@dataclass(frozen=True, slots=True)
class WeightCodes:
    """The codes of a quantised weight, ready for the product that its device has."""

    lasting: ClassVar[bool] = False
    quantized: Quantized

    def compute(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the prepared codes."""
        return prepare_weight(self.quantized.compute(weight)[0])

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        """Return empty prepared codes."""
        rows, channels = self.quantized.matrix.of(weight).shape
        return prepared_like(rows, channels, self.quantized.quantization.dtype, weight.device)

    def at(self, names: Names) -> WeightCodes:
        """Return those of another projection."""
        return WeightCodes(self.quantized.at(names))


@dataclass(frozen=True, slots=True)
class WeightScale:
    """The scales of a quantised weight.

    Attributes:
        quantized: the weight.
        outputs: what its outputs are to be multiplied by as well, such as the smooth vector of
            whoever reads them.
    """

    lasting: ClassVar[bool] = False
    quantized: Quantized
    outputs: tuple[Calibrated, ...] = ()

    def compute(self, weight: torch.Tensor) -> torch.Tensor:
        """Return fp32 [N]."""
        return self.applied(self.quantized.compute(weight)[1], weight)

    def applied(self, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return ``scale`` times what the outputs are to be multiplied by as well."""
        for factor in self.outputs:
            scale = scale * factor.compute(weight)
        return scale

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        """Return empty scales."""
        rows = self.quantized.matrix.of(weight).shape[-2]
        return weight.new_empty(rows, dtype=torch.float32, requires_grad=False)

    def at(self, names: Names) -> WeightScale:
        """Return those of another projection."""
        return WeightScale(self.quantized.at(names), tuple(one.at(names) for one in self.outputs))


@dataclass(frozen=True, slots=True)
class ScaledVector:
    """A vector of one number a channel, such as a norm's weight or a bias, times a smooth vector.

    Attributes:
        smooth: the smooth vector.
        offset: what the graph adds to the vector before it is used: 1 in some norms.
        dtype: in which the graph uses it.
    """

    lasting: ClassVar[bool] = False
    smooth: Calibrated
    offset: float
    dtype: torch.dtype

    def compute(self, weight: torch.Tensor) -> torch.Tensor:
        """Return (vector + offset) · smooth [K], computed in fp32.

        Raises:
            OptionError: if ``weight`` is no such vector.
        """
        smooth = self.smooth.compute(weight)
        if weight.shape != smooth.shape or not weight.is_floating_point():
            raise OptionError(
                f"weight is {weight.dtype} {list(weight.shape)}; valid: floating point, "
                f"{list(smooth.shape)}"
            )
        return ((weight.detach().float() + self.offset) * smooth).to(self.dtype)

    def like(self, weight: torch.Tensor) -> torch.Tensor:
        """Return an empty vector."""
        return weight.new_empty(weight.shape, dtype=self.dtype, requires_grad=False)

    def at(self, names: Names) -> ScaledVector:
        """Return that of another layer."""
        return replace(self, smooth=self.smooth.at(names))
