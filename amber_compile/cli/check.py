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

import torch

from amber_compile.debug.compare import check
from amber_compile.errors import AmberError, whole_number
from amber_compile.report import Report
from amber_compile.table import worst_list

from .models import ModelError, add_options, first_line, load, options_of, read_text

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
    text = read_text(arguments.text)
    _say(f"loading {arguments.model}")
    model, tokenizer = load(arguments.model)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    if not ids.numel():
        raise ModelError("the text has no token")
    _say(f"running {ids.shape[-1]} tokens, dense and sparse")
    try:
        report = check(model, ids, **options)
    except AmberError:
        raise
    except Exception as cause:  # whatever a model's own code raises
        raise ModelError(f"{arguments.model} cannot be run: {first_line(cause)}") from cause
    print(_json(report, arguments, ids) if arguments.json else _table(report, worst))
    return 0


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
