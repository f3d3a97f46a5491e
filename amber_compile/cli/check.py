"""``amber check MODEL --text FILE``: what sparsity changes in a model that reads a text.

    amber check examples/python-lm --text examples/quickstart.py
    amber check ./my-model --text book.txt --tokens 2048 --pattern 8:16 --json > errors.json

The model runs twice, dense and sparse side by side, where its weights are loaded: on the CPU. The
worst sites come first.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amber_compile.debug.compare import check
from amber_compile.errors import AmberError, OptionError, whole_number
from amber_compile.report import Report
from amber_compile.table import worst_list

from .models import (
    ModelError,
    add_options,
    check_folder,
    first_line,
    language_model_class,
    options_of,
)

HELP = "what sparsity changes in a model that reads a text: the error by site and at the output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or a hub name")
    parser.add_argument("--text", metavar="FILE", required=True, help="what the model reads")
    parser.add_argument("--tokens", type=int, default=512, help="of the text's start (512)")
    add_options(parser)
    parser.add_argument("--worst", type=int, default=10, help="how many sites to print (10)")
    parser.add_argument("--json", action="store_true", help="for machines, with every site")


def run(arguments: argparse.Namespace) -> int:
    """Check the model and print the errors."""
    options = options_of(arguments)
    tokens = whole_number("tokens", arguments.tokens, 1)
    worst = whole_number("worst", arguments.worst, 1)
    text = _read(arguments.text)
    model, ids = load(arguments.model, text, tokens)
    _say(f"running {ids.shape[-1]} tokens, dense and sparse")
    try:
        report = check(model, ids, **options)
    except AmberError:
        raise
    except Exception as cause:  # whatever a model's own code raises
        raise ModelError(f"{arguments.model} cannot be run: {first_line(cause)}") from cause
    print(_json(report, arguments, ids) if arguments.json else _table(report, worst))
    return 0


def load(name: str, text: str, tokens: int) -> tuple[nn.Module, torch.Tensor]:
    """Return the language model of a folder or hub name, and the first tokens of ``text``.

    Raises:
        ModelError: if there is none, it is no language model, or the text has no token.
    """
    try:
        import transformers
    except ImportError as cause:
        raise ModelError(
            "models are loaded by transformers: pip install 'amber-compile[examples]'"
        ) from cause
    check_folder(name)
    _say(f"loading {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for those who train the model
            config = transformers.AutoConfig.from_pretrained(name)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
            model = language_model_class(name, config).from_pretrained(name, dtype="auto")
    except AmberError:
        raise
    except Exception as cause:  # a missing file, no network, no such model, a newer transformers
        raise ModelError(f"{name} cannot be loaded: {first_line(cause)}") from cause
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    if not ids.numel():
        raise ModelError("the text has no token")
    return model.eval(), ids


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as cause:
        raise OptionError(f"--text {path!r} cannot be read: {cause.strerror}") from cause


def _table(report: Report, worst: int) -> str:
    parts = [f"Amber: {report.summary()}", f"output error: {report.output}"]
    sites = report.worst(worst)
    return "\n".join([*parts, "", worst_list(sites)] if sites else parts)


def _json(report: Report, arguments: argparse.Namespace, ids: torch.Tensor) -> str:
    """Return the facts as JSON, without the graphs themselves; sites sorted, the worst first."""
    facts = report.to_json()
    rank = {site.name: at for at, site in enumerate(report.worst(len(report.sites)))}
    facts["sites"].sort(key=lambda site: rank.get(site["name"], len(rank)))
    for graph in facts["graphs"]:
        del graph["stages"], graph["sites"]
    return json.dumps({"model": arguments.model, "tokens": ids.shape[-1], **facts}, indent=2)


def _say(progress: str) -> None:
    print(f"amber check: {progress}", file=sys.stderr)
