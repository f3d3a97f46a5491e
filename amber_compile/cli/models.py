"""What commands on models share: the backend's options, texts, and models by folder or hub name."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from amber_compile.errors import AmberError, OptionError, choices

OPTIONS = (
    *("preset", "pattern", "score", "correction", "plan", "skip", "projections"),
    *("dense_prefix", "min_tokens", "quantize", "quantize_skip", "decode"),
)
"""The arguments that are options of the backend."""


DTYPES = ("auto", "float32", "bfloat16", "float16")
NONE = "none"
"""What ``--correction`` takes for no correction."""


class ModelError(AmberError, ValueError):
    """A model cannot be found, read or traced."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the backend."""
    parser.add_argument("--pattern", help="N:M, such as 2:4, 4:8, 8:16")
    parser.add_argument("--preset", help="amber or paper")
    parser.add_argument("--score", help="magnitude, weight_norm or robust_norm")
    parser.add_argument("--correction", help=f"norm, variance or {NONE}")
    parser.add_argument("--plan", help="file of a plan: it decides instead of preset and pattern")
    parser.add_argument("--skip", action="append", help="names to leave dense, by fnmatch")
    parser.add_argument("--projections", action="append", help="names to sparsify, by fnmatch")
    parser.add_argument("--dense-prefix", type=int, help="first tokens to leave dense")
    parser.add_argument("--min-tokens", type=int, help="fewer tokens stay dense")
    parser.add_argument("--quantize", help="int8 or fp8: 8-bit weights and activations")
    parser.add_argument("--quantize-skip", action="append", help="names to leave in 16 bit")
    parser.add_argument("--decode", help="as --quantize: decode in 8 bits, 16-bit weights released")


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("correction") == NONE:
        chosen["correction"] = None
    return chosen


def load(name: str, dtype: str = "auto") -> tuple[nn.Module, Any]:
    """Return the language model of a folder or hub name, with its weights, and its tokenizer.

    Args:
        name: of the folder, or on the hub.
        dtype: of the weights: ``"float32"`` and the like, or ``"auto"`` as they are stored.

    Raises:
        OptionError: for another dtype.
        ModelError: if there is none, or it is no language model.
    """
    if dtype not in DTYPES:
        raise OptionError(choices("dtype", dtype, DTYPES))
    try:
        import transformers
    except ImportError as cause:
        raise ModelError(
            "models are loaded by transformers: pip install 'amber-compile[examples]'"
        ) from cause
    check_folder(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for those who train the model
            config = transformers.AutoConfig.from_pretrained(name)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
            auto = language_model_class(name, config)
            model, told = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except AmberError:
        raise
    except Exception as cause:  # a missing file, no network, no such model, a newer transformers
        raise ModelError(f"{name} cannot be loaded: {first_line(cause)}") from cause
    if missing := sorted(told["missing_keys"]):
        raise ModelError(
            f"{name} is no language model: {len(missing)} of its weights are missing, "
            f"such as {missing[0]}"
        )
    return model.eval(), tokenizer


def read_text(path: str) -> str:
    """Return what ``--text`` names; bytes that are no UTF-8 are replaced.

    Raises:
        OptionError: if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as cause:
        raise OptionError(f"--text {path!r} cannot be read: {cause.strerror}") from cause


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
