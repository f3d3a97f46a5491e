"""``amber eval MODEL --text FILE``: what sparsity costs a model on a text, dense beside sparse.

    amber eval examples/python-lm --text book.txt --pattern 2:4
    amber eval ./my-model --text book.txt --plan my.plan --generate 32 --json > eval.json
    amber eval ./my-model --text book.txt --tasks arc_easy,mine --task-folder tasks --limit 200

The text is cut into windows. Printed are losses, KL and top-1 agreement with their standard errors;
``--json`` has the keys dense, sparse and coverage. Bars are on stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amber_compile.errors import AmberError, OptionError, whole_number
from amber_compile.evaluation import (
    Evaluation,
    TaskResult,
    evaluate,
    evaluate_cases,
    evaluate_tasks,
)
from amber_compile.evaluation.levels import Case, coverage_cases
from amber_compile.evaluation.text import batched, windows
from amber_compile.explain import explain
from amber_compile.permute import permute_channels
from amber_compile.plan import Plan

from .models import DTYPES, ModelError, add_options, first_line, load, options_of, read_text

HELP = "what sparsity costs a model on a text: loss, KL, top-1, generation and tasks"
WINDOW, WINDOWS, BATCH = 512, 64, 4
DRAWN = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or a hub name")
    parser.add_argument("--text", metavar="FILE", required=True, help="what the model reads")
    parser.add_argument("--window", type=int, help=f"tokens read at once ({WINDOW} if it can)")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--windows", type=int, help=f"how many, of the text's start ({WINDOWS})")
    much.add_argument("--tokens", type=int, help="the same in tokens, rounded up")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"windows at a time ({BATCH})")
    add_options(parser)
    parser.add_argument("--backend", default="amber_eager", help="amber_eager (default) or amber")
    parser.add_argument("--dtype", default="auto", help=f"of the weights: {', '.join(DTYPES)}")
    parser.add_argument("--device", default="cpu", help="where to run, such as cuda (cpu)")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="tokens to write")
    parser.add_argument("--prompts", type=int, default=16, help="windows to continue (16)")
    parser.add_argument("--tasks", metavar="A,B", help="of lm-evaluation-harness")
    parser.add_argument("--task-folder", metavar="DIR", help="where further tasks lie, as YAML")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--plot", metavar="FILE", help="draw error against coverage: .png or .svg")
    parser.add_argument("--no-progress", action="store_true", help="show no bars")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate the model and print what it costs."""
    options = options_of(arguments)
    _check(arguments)
    text = read_text(arguments.text)
    _say(f"loading {arguments.model}")
    model, tokenizer = _load(arguments)
    if "plan" in options:
        options["plan"] = Plan.load(options["plan"])
        permute_channels(model, options["plan"])
    batches = _batches(arguments, text, tokenizer, model)
    _say(f"reading {sum(map(len, batches))} windows of {batches[0].shape[1]} tokens")
    try:
        own = _evaluate(arguments, model, batches, options)
        presets = _presets(arguments, model, batches) if arguments.plot else {}
        tasks = _tasks(arguments, model, tokenizer, options)
    except AmberError:
        raise
    except ImportError as cause:
        raise OptionError(str(cause)) from cause
    except Exception as cause:  # whatever a model's own code raises
        raise ModelError(f"{arguments.model} cannot be run: {first_line(cause)}") from cause
    if arguments.plot:
        _draw(own, presets, arguments)
    print(json.dumps(_json(own, tasks), indent=2) if arguments.json else _text(own, tasks))
    return 0


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the model where it is to run, and its tokenizer.

    Raises:
        ModelError: as :func:`load`, or if the device is not there.
    """
    model, tokenizer = load(arguments.model, arguments.dtype)
    try:
        return model.to(arguments.device), tokenizer
    except Exception as cause:  # no such device, no memory on it, a PyTorch without it
        raise ModelError(f"--device {arguments.device!r}: {first_line(cause)}") from cause


def _evaluate(
    arguments: argparse.Namespace,
    model: nn.Module,
    batches: Sequence[Tensor],
    options: Mapping[str, Any],
) -> Evaluation:
    """Return what the options cost."""
    return evaluate(
        model,
        batches,
        backend=arguments.backend,
        generate=arguments.generate,
        prompts=arguments.prompts,
        progress=not arguments.no_progress,
        **options,
    )


def _presets(
    arguments: argparse.Namespace, model: nn.Module, batches: Sequence[Tensor]
) -> dict[Case, Evaluation]:
    """Return what each preset costs at more and more coverage, on the same text."""
    _say("reading again, with each preset and more and more covered, for the plot")
    cases = coverage_cases(explain(model, batches[0][:1]))
    named = {str(at): options for at, options in enumerate(cases.values())}
    shown = {"backend": arguments.backend, "progress": not arguments.no_progress}
    return dict(zip(cases, evaluate_cases(model, batches, named, **shown).values(), strict=True))


def _tasks(
    arguments: argparse.Namespace, model: nn.Module, tokenizer: Any, options: Mapping[str, Any]
) -> list[TaskResult]:
    """Return the results of the tasks that were asked for."""
    if not arguments.tasks:
        return []
    return evaluate_tasks(
        model,
        tokenizer,
        [name.strip() for name in arguments.tasks.split(",") if name.strip()],
        folder=arguments.task_folder,
        limit=arguments.limit,
        backend=arguments.backend,
        progress=not arguments.no_progress,
        **options,
    )


def _batches(
    arguments: argparse.Namespace, text: str, tokenizer: Any, model: nn.Module
) -> list[Tensor]:
    """Return the windows to read, some at a time."""
    known = getattr(model.config, "max_position_embeddings", None)
    known = known if isinstance(known, int) else WINDOW
    length = min(WINDOW, known) if arguments.window is None else arguments.window
    count = arguments.windows or WINDOWS
    if arguments.tokens:
        count = -(-arguments.tokens // length)
    return list(batched(windows(text, tokenizer, length, count), arguments.batch))


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would fail only after minutes.

    Raises:
        OptionError: for a number that is too small, or an ending of a plot that is not known.
    """
    for name, least in (("window", 2), ("windows", 1), ("tokens", 1), ("limit", 1)):
        if (value := getattr(arguments, name)) is not None:
            whole_number(name, value, least)
    for name, least in (("batch", 1), ("generate", 0), ("prompts", 1)):
        whole_number(name, getattr(arguments, name), least)
    if arguments.plot and Path(arguments.plot).suffix.lower() not in DRAWN:
        raise OptionError(f"--plot {arguments.plot!r} must end with {' or '.join(DRAWN)}")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install 'amber-compile[inspect]'")


# ---- what is printed -----------------------------------------------------------------------------


def _json(found: Evaluation, tasks: Sequence[TaskResult]) -> dict[str, Any]:
    """Return the keys dense, sparse and coverage; the tasks' values stand in the first two."""
    facts = found.to_json()
    for one in tasks:
        told = one.to_json()
        for side in ("dense", "sparse"):
            values = {one.metric: told[side], f"{one.metric}_se": told[f"{side}_se"]}
            if side == "sparse":
                values[f"{one.metric}_difference_se"] = told["difference_se"]
            facts[side].setdefault("tasks", {}).setdefault(one.task, {}).update(values)
    return facts


def _text(found: Evaluation, tasks: Sequence[TaskResult]) -> str:
    return "\n".join([str(found), *([""] if tasks else []), *map(str, tasks)])


def _draw(
    own: Evaluation, presets: Mapping[Case, Evaluation], arguments: argparse.Namespace
) -> None:
    """Draw the frontier: these options, and the presets."""
    from amber_compile.evaluation.plots import Point, frontier

    def point(one: Evaluation, method: str, pattern: str) -> Point:
        error = one.delta or one.kl
        return Point(method, pattern, one.coverage, error.mean, error.error)

    points = [point(one, preset, pattern) for (preset, pattern, _), one in presets.items()]
    given = "plan" if arguments.plan else "options"
    points.append(point(own, f"the given {given}", "as given"))
    measure = "ΔNLL" if own.delta else "KL(dense ‖ sparse)"
    frontier(points, arguments.plot, measure=f"{measure}, nats a token", title=arguments.model)
    _say(f"wrote {arguments.plot}")


def _say(progress: str) -> None:
    print(f"amber eval: {progress}", file=sys.stderr)
