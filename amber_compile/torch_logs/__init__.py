"""Amber's names for ``TORCH_LOGS``.

PyTorch refuses a name there that nothing has registered, and reads the variable while ``import
torch`` runs, long before a backend is looked up. What can register names earlier is an entry point
of the group ``torch.backends``. So this file is installed a second time, as ``amber_torch_logs``: a
package of its own, for every ``import torch`` runs it, and should load nothing else.
"""

from __future__ import annotations

import contextlib

LOGGER = "amber_compile"
ARTIFACTS = {
    "amber_graphs": "The graph that Dynamo traced, and what Amber rewrote it to.",
    "amber_sites": "Amber's table: each projection, sparse with which settings or dense and why.",
}


def register_logs() -> None:
    """Make our names known to ``TORCH_LOGS`` and ``torch._logging.set_logs``."""
    from torch._logging import _internal

    _internal.register_log("amber", LOGGER)
    for name, description in ARTIFACTS.items():
        _internal.register_artifact(name, description, visible=True)


def entry_point() -> None:
    """Register the names while torch is imported; whatever happens, that import must not fail."""
    with contextlib.suppress(Exception):
        register_logs()
