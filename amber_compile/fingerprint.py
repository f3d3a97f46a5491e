"""Tell whether a weight was written to where PyTorch does not count: a hash of a sample of it.

    fingerprint(weight) = hash of 256 of its elements, evenly spaced, bit for bit

``weight.data += delta``, as adapters are merged, leaves identity, address and version as they were
and changes nearly every element. A write to a few elements may escape.
"""

from __future__ import annotations

import torch

SAMPLES = 256


def fingerprint(weight: torch.Tensor) -> int:
    """Return the hash; 0 for a tensor without values of its own (a subclass, or ``meta``).

    It copies a kilobyte from the weight's device, and waits for that.
    """
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.is_meta:
        return 0
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // SAMPLES) | 1  # odd: not always the same columns
        sample = flat[::step].clone().view(torch.uint8)
        return hash(bytes(sample.tolist()))
