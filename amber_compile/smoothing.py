"""Smoothing: move the range of single channels between activations and weights.

    s_j = a_j^α / w_j^(1 - α)          a_j = max |X[:, j]|,   w_j = max |W[:, j]|

| kind          | X' = X · v   | W' = W / v   | source                                          |
|---------------|--------------|--------------|-------------------------------------------------|
| `smoothquant` | v = 1 / s    | W · s        | SmoothQuant, arXiv 2211.10438, equation 4       |
| `outstanding` | v = s        | W / s        | Outstanding-sparse, arXiv 2508.02128, section 4 |

The paper puts ŝ = 1 / s in the place of s, "to expand the activation range"; its other reading,
X · ŝ, is SmoothQuant with the paper's α. X' W'ᵀ = X Wᵀ, and |x_j v_j| · ‖W_j / v_j‖ is
|x_j| · ‖W_j‖: smoothing changes what rounding to few bits costs, not which channels a weighted
selection keeps. v has geometric mean 1; a channel that is never active, or that no weight reads,
has v = 1, and no v leaves [2^-12, 2^12].
"""

from __future__ import annotations

import torch

from .errors import OptionError, choices
from .quantization import ALPHAS

LARGEST = 2.0**12


def smooth_vector(
    absmax: torch.Tensor, weight_max: torch.Tensor, kind: str, alpha: float
) -> torch.Tensor:
    """Return v, float32 [K], by which activations are multiplied.

    Args:
        absmax: [K], the largest |x| of each channel over the calibration text.
        weight_max: [K], the largest |w| of each channel, over all weights that read the input.
        kind: ``smoothquant`` or ``outstanding``.
        alpha: the exponent, 0 to 1.

    Raises:
        OptionError: for another kind, or ranges that do not fit or are not finite.
    """
    if kind not in ALPHAS:
        raise OptionError(choices("smooth", kind, ALPHAS))
    if absmax.shape != weight_max.shape or absmax.dim() != 1:
        raise OptionError(
            f"absmax has shape {list(absmax.shape)}, weight_max {list(weight_max.shape)}; "
            "valid: [channels] each"
        )
    active, weight = absmax.double(), weight_max.double()
    if not (active.isfinite().all() and weight.isfinite().all()):
        raise OptionError("absmax and weight_max must be finite to smooth a projection")
    used = (active > 0) & (weight > 0)
    log = alpha * active.clamp(min=1e-300).log() - (1 - alpha) * weight.clamp(min=1e-300).log()
    log = torch.where(used, log if kind == "outstanding" else -log, 0)
    if used.any():
        log = torch.where(used, log - log[used].mean(), 0)
    return log.exp().clamp(1 / LARGEST, LARGEST).float()
