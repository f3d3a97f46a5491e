"""``amber explain MODEL``: what would be sparse, why the rest is not, and what it is worth.

    amber explain meta-llama/Llama-3.1-8B --pattern 8:16
    amber explain ./my-model --device cpu --json > report.json

Only the model's configuration is read, no weights: the model is built on the meta device. So scores
are not computed, and no plan or pattern fails for a weight that is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amber_compile.errors import AmberError, whole_number
from amber_compile.explain import explain
from amber_compile.report import Report

from .models import (
    ModelError,
    add_options,
    check_folder,
    first_line,
    language_model_class,
    options_of,
)

if TYPE_CHECKING:
    from amber_compile.cost.rates import Rates

HELP = "what would be sparse in a model, why the rest is not, and what it is worth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder with a config.json, or a hub name")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence (2048)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    add_options(parser)
    parser.add_argument("--device", default="cuda", help="to explain for: cuda (default) or cpu")
    parser.add_argument("--machine", help="the GPU to explain for, such as 'H100 SXM'")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--html", metavar="PATH", help="write a page with the graphs as well")


def run(arguments: argparse.Namespace) -> int:
    """Explain the model and print what was found."""
    rates = _rates(arguments)
    options = options_of(arguments)
    shape = tuple(whole_number(name, getattr(arguments, name), 1) for name in ("batch", "tokens"))
    model = build(arguments.model)
    known = getattr(model.config, "max_position_embeddings", None)
    if isinstance(known, int) and known < shape[1]:
        _say(f"the model knows {known} positions, fewer than --tokens {shape[1]}")
    _say(f"tracing {shape[0]} x {shape[1]} tokens for {arguments.device}")
    tokens = torch.empty(shape, dtype=torch.long, device="meta")
    try:
        report = explain(
            model,
            tokens,
            device=arguments.device,
            capability=_capability(arguments),
            **options,
        )
    except AmberError:
        raise
    except Exception as cause:  # whatever a model's own code raises
        raise ModelError(f"{arguments.model} cannot be traced: {first_line(cause)}") from cause
    worth = expectation(report, rates, next(model.parameters()).dtype, math.prod(shape))
    report.explained += f"\n{worth['text']}"
    if arguments.html:
        report.to_html(arguments.html, title=arguments.model)
        _say(f"wrote {arguments.html}")
    print(_json(report, worth, arguments) if arguments.json else report)
    return 0


def expectation(
    report: Report, rates: Rates | None, dtype: torch.dtype, tokens: int
) -> dict[str, Any]:
    """Return the speed-up that the cost model expects of the projections, or why it is unknown."""
    from amber_compile.cost import cost_of
    from amber_compile.cost.rates import machines

    if rates is None:
        known = ", ".join(machines())
        text = f"expected speed-up: no rates for this machine; --machine NAME has those of {known}"
        return {"machine": None, "text": text}
    cost = cost_of(report, rates, dtype)
    speedup, least = cost.speedup(tokens), cost.break_even
    when = "at no token count" if least is None else f"from {least} tokens"
    text = (
        f"expected speed-up of the projections in prefill: {speedup:.2f}x with {tokens} tokens on "
        f"{rates.name}; faster {when}"
    )
    facts = {"machine": rates.name, "tokens": tokens, "speedup": speedup, "break_even": least}
    return {**facts, "text": text}


def _rates(arguments: argparse.Namespace) -> Rates | None:
    """Return the rates of the machine that is named, or is here."""
    from amber_compile.cost.rates import rates_of, rates_of_device

    if arguments.machine:
        return rates_of(arguments.machine)
    return rates_of_device("cuda") if arguments.device == "cuda" else None


def _capability(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Return the compute capability of the GPU that is named, if one is."""
    from amber_compile.cost.rates import capability_of

    named = arguments.machine and arguments.device == "cuda"
    return capability_of(arguments.machine) if named else None


# ---- the model -----------------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    """Return the language model of a folder or hub name on the meta device, from its config.

    Raises:
        ModelError: if there is none, or it is no language model.
    """
    try:
        import transformers
    except ImportError as cause:
        raise ModelError(
            "models are built by transformers: pip install 'amber-compile[examples]'"
        ) from cause
    check_folder(name)
    _say(f"reading the configuration of {name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as cause:  # a missing file, no network, no such model, a newer transformers
        raise ModelError(f"{name} has no readable configuration: {first_line(cause)}") from cause
    auto = language_model_class(name, config)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    if getattr(config, "quantization_config", None):
        _say("its weights are stored quantised: what follows is the model without that")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for those who run the model
            model: nn.Module = auto.from_config(config, dtype=dtype)
    except Exception as cause:  # sizes that do not fit together, a package that is missing
        raise ModelError(f"{name} cannot be built: {first_line(cause)}") from cause
    return model.eval()


# ---- what is printed -----------------------------------------------------------------------------


def _json(report: Report, worth: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Return the facts as JSON, without the graphs themselves: the HTML page has those."""
    facts = report.to_json()
    for graph in facts["graphs"]:
        del graph["stages"], graph["sites"]
    head = {"model": arguments.model, "device": arguments.device}
    head |= {"batch": arguments.batch, "tokens": arguments.tokens}
    return json.dumps({**head, "expected": worth, **facts}, indent=2)


def _say(progress: str) -> None:
    print(f"amber explain: {progress}", file=sys.stderr)
