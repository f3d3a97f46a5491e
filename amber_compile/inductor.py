"""Hand a graph to Inductor, with its caches knowing which Amber wrote the graph.

PyTorch's on-disk caches see a graph and its inputs, not the bodies of the passes and operators
behind them. Their sources, hashed, become part of the key, so that another version of Amber never
finds this one's result. A graph without Amber's operators keeps the plain key: the dense backend
and Amber then share what they compile.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, cast

import torch
from torch.fx import GraphModule

from .binding import Compiled
from .config import AmberConfig
from .errors import OptionError, choices

HASHED = (
    *("amber_compile", "amber_compile.integrations", "amber_compile.kernels"),
    *("amber_compile.passes", "amber_compile.programs"),
)
"""The packages that decide what a rewritten graph is."""


def compile_with_inductor(
    gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
) -> Compiled:
    """Compile ``gm`` with Inductor under the options' mode and config patches.

    Raises:
        OptionError: if ``inductor=`` names no config entry of Inductor.
    """
    from torch._inductor.compile_fx import compile_fx  # seconds to import: not needed to look

    patches = inductor_patches(config)
    with _cache_tag() if rewritten else contextlib.nullcontext():
        compiled: Any = compile_fx(gm, inputs, config_patches=patches)
    return cast("Compiled", compiled)


def inductor_patches(config: AmberConfig) -> dict[str, Any]:
    """Return the Inductor config entries that ``mode`` and ``inductor`` ask for."""
    import torch._inductor.config as inductor_config

    known = inductor_config.get_config_copy()
    for key in config.inductor:
        if key not in known:
            raise OptionError(choices("Inductor option", key, known))
    return {**torch._inductor.list_mode_options(config.mode), **config.inductor}


@contextlib.contextmanager
def _cache_tag() -> Iterator[None]:
    """Add the hash of Amber's sources to the tag under which PyTorch caches what it compiles."""
    tag = f"{torch.compiler.config.cache_key_tag}amber-{source_hash()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]  # installed
        yield


@functools.cache
def source_hash() -> str:
    """Return a hash of the sources of Amber's passes, kernels and compiler, and of its rules."""
    digest = hashlib.sha256()
    folders = [resources.files(package) for package in HASHED]
    for folder in [*folders, resources.files("amber_compile") / "presets"]:
        for source in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if source.name.endswith((".py", ".json")):
                digest.update(source.name.encode())
                digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
