"""Models that a command names: a folder with a config.json, or a name of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amber_compile.errors import AmberError


class ModelError(AmberError, ValueError):
    """A model cannot be found, read or traced."""


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
