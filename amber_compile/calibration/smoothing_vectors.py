"""The smooth vectors of a quantised model: one for each input, whatever reads it.

    v = smooth_vector(max |x_j|, max |w_j| over all weights that read x)         smoothing.py

Projections that read the same input share its vector, so that a norm in front of them can take it
in. ``absmax`` comes from the pass over the text (sensitivity.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amber_compile.quantization import Quantization
from amber_compile.smoothing import smooth_vector

from .candidates import Candidates
from .options import CalibrationOptions
from .statistics import Statistics

NOT_READ = "calibration: no graph multiplies by it"


def smooth_vectors(
    candidates: Candidates, fitted: Statistics, quantized: Mapping[str, Quantization | str]
) -> dict[str, Tensor]:
    """Return the vector, fp32 [K], of each projection that is quantised after smoothing."""
    readers: dict[int, list[str]] = {}
    for name, chosen in quantized.items():
        smoothed = isinstance(chosen, Quantization) and chosen.smooth
        if smoothed and name in candidates.seen and candidates.seen[name].dim() == 2:
            readers.setdefault(candidates.inputs[name], []).append(name)
    found: dict[str, Tensor] = {}
    for names in readers.values():
        absmax = torch.stack([fitted.of(name)["absmax"].double() for name in names]).amax(0)
        largest = [candidates.seen[name].abs().amax(0).double() for name in names]
        how = quantized[names[0]]
        assert isinstance(how, Quantization)
        assert how.smooth is not None
        assert how.alpha is not None
        vector = smooth_vector(absmax, torch.stack(largest).amax(0), how.smooth, how.alpha)
        found |= dict.fromkeys(names, vector)
    return found


def quantizations(
    candidates: Candidates, options: CalibrationOptions
) -> dict[str, Quantization | str]:
    """Return how each projection is quantised, or why the backend does not, if that is asked for.

    Smoothing is for those whose ranges were measured; the others are quantised without.
    """
    if options.quantize is None:
        return {}
    found: dict[str, Quantization | str] = {}
    for name, site in candidates.sites.items():
        decision = site.decision
        if decision.quantization is None:
            found[name] = str(decision.unquantized or NOT_READ)
            continue
        measured = name in candidates.seen and candidates.seen[name].dim() == 2
        found[name] = options.quantization if measured else decision.quantization
    return found
