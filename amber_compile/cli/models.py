"""What commands on models share: the backend's options, and models by folder or hub name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from amber_compile.errors import AmberError

OPTIONS = ("preset", "pattern", "plan", "skip", "projections", "dense_prefix", "min_tokens")
"""The arguments that are options of the backend."""


class ModelError(AmberError, ValueError):
    """A model cannot be found, read or traced."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the backend."""
    parser.add_argument("--pattern", help="N:M, such as 2:4, 4:8, 8:16")
    parser.add_argument("--preset", help="amber or paper")
    parser.add_argument("--plan", help="file of a plan: it decides instead of preset and pattern")
    parser.add_argument("--skip", action="append", help="names to leave dense, by fnmatch")
    parser.add_argument("--projections", action="append", help="names to sparsify, by fnmatch")
    parser.add_argument("--dense-prefix", type=int, help="first tokens to leave dense")
    parser.add_argument("--min-tokens", type=int, help="fewer tokens stay dense")


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def check_folder(name: str) -> None:
    """Tell a missing folder or file from a hub name: a hub name is ``name`` or ``owner/name``."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"the folder {name} holds no config.json")
    elif folder.exists():
        raise ModelError(f"{name} is a file; needed: a folder with a config.json, or a hub name")
    elif not name or name[0] in "./~" or name.endswith("/") or name.count("/") > 1:
        raise ModelError(f"there is no folder {name!r}")


def language_model_class(name: str, config: Any) -> Any:
    """Return the transformers class that makes a language model of ``config``."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    stated = getattr(config, "architectures", None) or []
    masked = any(one.endswith("ForMaskedLM") for one in stated)
    if masked and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise ModelError(f"{name} is a {config.model_type!r}, which is no language model")


def first_line(cause: BaseException) -> str:
    """Return the first line of an error."""
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
