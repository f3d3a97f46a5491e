"""What does N:M cost the shipped model?  Held-out loss of every pattern, score and correction.

    python benchmarks/accuracy.py [--json] [--windows 96] [--only "2:4*"]
    python benchmarks/accuracy.py --calibrate --plot frontier.png
    python benchmarks/accuracy.py --plan mine=my.plan --only none

All rows read the same windows of held-out text, so a row is the mean *difference* to the dense
model in nats per token, with the standard error over windows, and KL(dense ‖ sparse) per token.
A row is what ``torch.compile(model, backend="amber", options=...)`` does, rewritten by
``amber_eager``, which generates no code. Nothing is calibrated but the rows that say so: by
``--calibrate``, with text of the training split, of which no document is held out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from amber_compile import Plan
from amber_compile.evaluation import Evaluation, evaluate, evaluate_cases
from amber_compile.evaluation.plots import Point, frontier
from amber_compile.permute import permute_channels

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "python-lm"
RESULTS = Path(__file__).with_name("results") / "accuracy.json"

BATCH = 4
PATTERNS = ("2:4", "4:8", "8:16")
MORE = {
    "with o": ["*.[qo]_proj", "*.gate_proj", "*.down_proj"],
    "with o and up": ["*.[qo]_proj", "*.gate_proj", "*.up_proj", "*.down_proj"],
    "all but the head": ["*.layers.*"],
}
CASES: dict[str, dict[str, Any]] = {  # "pattern method[: what]"
    **{
        f"{pattern} {score}, {correction}": {
            "pattern": pattern,
            "score": score,
            "correction": correction,
        }
        for pattern in PATTERNS
        for score in ("magnitude", "weight_norm", "robust_norm")
        for correction in (None, "norm", "variance")
    },
    **{
        f"2:4 {method}: {what}": {**options, "projections": projections}
        for method, options in {
            "robust_norm, None": {"preset": "paper"},
            "weight_norm, norm": {"preset": "amber"},
        }.items()
        for what, projections in MORE.items()
    },
    "2:4 weight_norm, norm: first token dense": {"dense_prefix": 1},
    **{
        f"{kept} {dtype}": {"quantize": dtype, **options}
        for dtype in ("int8", "fp8")
        for kept, options in {
            "dense": {"skip": ["*"]},
            "2:4": {},
            "8:16": {"pattern": "8:16"},
        }.items()
    },
}
CALIBRATED: dict[str, dict[str, Any]] = {
    **{
        f"{pattern} calibrated, {copies}": {
            "pattern": pattern,
            "rule": "paper",
            "corrections": corrections,
        }
        for pattern in PATTERNS
        for copies, corrections in (("one copy", "free"), ("two copies", "all"))
    },
    **{
        f"2:4 calibrated, one copy: {share:.0%}": {"pattern": "2:4", "coverage": share}
        for share in (0.7, 0.8, 0.9)
    },
    "2:4 calibrated, one copy: the paper's damage": {"pattern": "2:4"},
}
"""What :func:`amber_compile.calibrate` is asked for."""

# ---- text ----------------------------------------------------------------------------------------


def windows_of(split: str, count: int, seed: int = 0) -> Tensor:
    """Return ``count`` windows of tokens, chosen at random once and for all."""
    sys.path.insert(0, str(ROOT / "examples"))
    from python_corpus import documents
    from python_tokens import tokenize, windows

    found = windows(tokenize(documents(split), AutoTokenizer.from_pretrained(MODEL)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return found[order[:count]]


# ---- rows ----------------------------------------------------------------------------------------


def row(label: str, found: Evaluation) -> dict[str, Any]:
    """Return what is stored of one case."""
    assert found.dense is not None
    assert found.delta is not None
    return {
        "case": label,
        "dnll": found.delta.mean,
        "se": found.delta.error,
        "kl": found.kl.mean,
        "kl_se": found.kl.error,
        "top1": found.top1.mean,
        "coverage": found.coverage,
        "removed": found.removed,
        "quantized": found.quantized,
        "dense_nll": found.dense.mean,
    }


def planned(model: nn.Module, batches: Sequence[Tensor], label: str, plan: Plan) -> dict[str, Any]:
    """Return the row of a plan; the model's channels are in its order meanwhile."""
    permute_channels(model, plan)
    try:
        return row(label, evaluate(model, batches, plan=plan))
    finally:
        permute_channels(model, plan, undo=True)


def calibrated(
    model: nn.Module, batches: Sequence[Tensor], cases: Mapping[str, Mapping[str, Any]], count: int
) -> list[dict[str, Any]]:
    """Return the row of each plan that calibration makes of other text."""
    from amber_compile.calibration.calibrate import calibrate

    text = windows_of("train", count).split(BATCH)
    return [
        planned(model, batches, label, calibrate(model, text, **options))
        for label, options in cases.items()
    ]


def measure(arguments: argparse.Namespace, model: nn.Module) -> list[dict[str, Any]]:
    """Return all rows that were asked for."""
    batches = windows_of("heldout", arguments.windows).split(BATCH)
    rows = []
    if cases := chosen(CASES, arguments.only):
        rows += [row(*each) for each in evaluate_cases(model, batches, cases).items()]
    if arguments.calibrate:
        asked = chosen(CALIBRATED, arguments.only)
        rows += calibrated(model, batches, asked, arguments.calibrate)
    for named in arguments.plan:
        label, _, path = named.partition("=")
        rows.append(planned(model, batches, label, Plan.load(path)))
    return rows


def chosen(cases: Mapping[str, dict[str, Any]], pattern: str) -> dict[str, dict[str, Any]]:
    """Return the cases whose name matches."""
    return {name: options for name, options in cases.items() if fnmatchcase(name, pattern)}


# ---- what is shown -------------------------------------------------------------------------------


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table."""
    title = f"dense NLL {rows[0]['dense_nll']:.4f}"
    table = Table("case", "ΔNLL", "± SE", "KL", "± SE", "top-1", "MACs covered", title=title)
    for each in rows:
        numbers = (f"{each[name] or 0:.4f}" for name in ("dnll", "se", "kl", "kl_se"))
        shares = f"{each['top1']:.1%}", f"{each['coverage']:.1%}"
        table.add_row(str(each["case"]), *numbers, *shares)
    Console(width=110).print(table, "; ".join(f"{k}: {v}" for k, v in machine().items()))


def draw(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Draw error against coverage."""
    points = []
    for each in rows:
        pattern, _, method = str(each["case"]).partition(":" if " " not in each["case"] else " ")
        name = method.partition(":")[0] or "plan"
        points.append(Point(name, pattern, each["coverage"], each["dnll"], each["se"]))
    frontier(points, path, title="The shipped model on held-out text")


def main(given: Sequence[str] | None = None) -> None:
    """Measure every case on the same text and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--windows", type=int, default=96, help="windows of 512 tokens")
    parser.add_argument("--only", default="*", help="cases by name, such as '2:4*'")
    parser.add_argument("--plan", action="append", default=[], help="NAME=FILE: a row for a plan")
    parser.add_argument(
        "--calibrate", type=int, nargs="?", const=96, metavar="WINDOWS", help="calibrate as well"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw error against coverage")
    arguments = parser.parse_args(given)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rows = measure(arguments, model)
    show(rows)
    if arguments.plot:
        draw(rows, arguments.plot)
    if arguments.json:
        RESULTS.parent.mkdir(exist_ok=True)
        result = {"machine": machine(), "windows": arguments.windows, "rows": rows}
        result["dense_nll"] = rows[0]["dense_nll"]
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
