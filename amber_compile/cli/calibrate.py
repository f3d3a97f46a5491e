"""``amber calibrate MODEL --text FILE -o PLAN``: the most sparsity for the least damage.

    amber calibrate examples/python-lm --text book.txt -o python-lm.plan
    amber calibrate ./my-model --text a.txt --text b.txt --pattern 8:16 --coverage 0.8 -o my.plan
    amber calibrate ./my-model --text a.txt --max-error 0.05 --resume state -o my.plan --json

How much becomes sparse is said by one of ``--max-error`` (KL in nats a token, of the whole model on
held-out text), ``--coverage`` (share of the linear multiply-accumulates) and ``--rule paper``;
without any, as much as costs no more than the paper's method does. Progress is on stderr.

    torchrun --nproc-per-node 2 --no-python amber calibrate ...        each process reads its share
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amber_compile.calibration import Calibration, CalibrationOptions, calibration
from amber_compile.calibration.distributed import joined_ranks, rank
from amber_compile.calibration.text import batches_of
from amber_compile.errors import AmberError, OptionError

from .calibration_table import described
from .models import DTYPES, ModelError, first_line, load, read_text

HELP = "plan what to sparsify in a model, from your own text: most work, least damage"
OPTIONS = (
    *("pattern", "max_error", "coverage", "rule", "corrections", "quantize", "smooth", "alpha"),
    *("projections", "skip", "validation", "steps", "seed"),
)
"""The arguments that are options of the calibration."""
WINDOW = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model, or a hub name")
    add("--text", metavar="FILE", action="append", required=True, help="your text; may be repeated")
    add("-o", "--output", metavar="PLAN", required=True, help="file of the plan to write")
    add("--pattern", help="N:M (2:4)")
    add("--max-error", type=float, help="damage to stay below: KL in nats a token")
    add(
        "--coverage", type=float, help="share of linear multiply-accumulates to make sparse, 0 to 1"
    )
    add("--rule", help="paper: the projections that the paper takes")
    add("--corrections", help="free (default), all, none, or names with commas between")
    add("--quantize", help="int8 or fp8: 8-bit weights and activations")
    add("--smooth", help="smoothquant (default), outstanding or none, with --quantize")
    add("--alpha", type=float, help="exponent of the smoothing")
    add("--projections", action="append", help="names that may be sparse, by fnmatch (all)")
    add("--skip", action="append", help="names to leave dense, by fnmatch")
    add("--tokens", type=int, default=98304, help="of text to read (98304)")
    add("--window", type=int, help=f"tokens of a window ({WINDOW}, or what the model knows)")
    add("--batch", type=int, default=4, help="windows at a time (4)")
    add("--steps", type=int, help="of tuning (40)")
    add("--validation", type=float, help="share of the text that is held out (0.25)")
    add("--seed", type=int, help="of everything that is drawn (0)")
    add("--dtype", default="auto", help=f"of the weights: {', '.join(DTYPES)}")
    add("--device", default="cpu", help="where to run, such as cuda (cpu)")
    add("--resume", metavar="FOLDER", help="keep progress there, and go on from it")
    add("--no-progress", action="store_true", help="show no bars")
    add("--json", action="store_true", help="for machines, with every site")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate the model, write the plan and print what was decided."""
    options = CalibrationOptions(**_options(arguments))
    _check_output(Path(arguments.output))
    texts = [read_text(path) for path in arguments.text]
    _say(f"loading {arguments.model}")
    model, tokenizer = load(arguments.model, arguments.dtype)
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        batches = _batches(texts, tokenizer, model, arguments)
    for doubt in doubts:
        _say(str(doubt.message))
    _say(f"reading {sum(one.numel() for one in batches)} tokens in {len(batches)} batches")
    with joined_ranks(arguments.device):
        made = _calibrate(model, batches, options, arguments)
        if rank() == 0:
            _write(made, arguments)
    return 0


def _write(made: Calibration, arguments: argparse.Namespace) -> None:
    """Save the plan and print what was decided."""
    try:
        made.plan.save(arguments.output)
    except OSError as cause:
        raise OptionError(
            f"-o {arguments.output!r} cannot be written: {cause.strerror or cause}; what was there "
            "before is unchanged"
        ) from cause
    _say(f"wrote {arguments.output}")
    print(json.dumps(made.to_json(), indent=1) if arguments.json else described(made))


def _calibrate(
    model: nn.Module,
    batches: list[Tensor],
    options: CalibrationOptions,
    arguments: argparse.Namespace,
) -> Calibration:
    try:
        return calibration(
            model.to(arguments.device),
            batches,
            options,
            progress=not arguments.no_progress,
            resume=arguments.resume,
        )
    except AmberError:
        raise
    except Exception as cause:  # whatever a model's own code raises
        raise ModelError(f"{arguments.model} cannot be run: {first_line(cause)}") from cause


def _batches(
    texts: list[str], tokenizer: Any, model: nn.Module, arguments: argparse.Namespace
) -> list[Tensor]:
    known = getattr(model.config, "max_position_embeddings", None)
    longest = known if isinstance(known, int) else WINDOW
    return batches_of(
        texts,
        tokenizer,
        tokens=arguments.tokens,
        window=arguments.window or min(WINDOW, longest),
        batch=arguments.batch,
        seed=arguments.seed or 0,
    )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("smooth") == "none":
        given["smooth"] = None
    return given


def _check_output(path: Path) -> None:
    """Refuse a place that cannot be written to before anything is computed."""
    if path.is_dir():
        raise OptionError(f"-o {str(path)!r} is a folder; name a file")
    if not path.resolve().parent.is_dir():
        raise OptionError(f"-o {str(path)!r}: there is no folder {str(path.parent)!r}")


def _say(progress: str) -> None:
    print(f"amber calibrate: {progress}", file=sys.stderr)
