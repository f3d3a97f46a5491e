"""What do eight bits and smoothing cost the shipped model?  Held-out loss, with and without 2:4.

    python benchmarks/smoothing.py [--json] [--windows 96]

W8A8 alone and with 2:4 (the paper's rule, preset ``amber``), int8, under each smoothing: none,
Outstanding-sparse, and SmoothQuant with the exponents of both papers; SmoothQuant with 0.1 is the
other reading of Outstanding-sparse. Ranges of the activations come from windows of the training
split. All rows read the same held-out windows; ± is a paired standard error over windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accuracy import BATCH, MODEL, windows_of
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from amber_compile import Plan, explain
from amber_compile.evaluation import Evaluation, evaluate_cases
from amber_compile.plan import PlannedSite
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization
from amber_compile.smoothing import smooth_vector

RESULTS = Path(__file__).with_name("results") / "smoothing.json"
SMOOTHINGS = {
    "no smoothing": Quantization("int8"),
    "outstanding, 0.1": Quantization("int8", "outstanding", 0.1),
    "smoothquant, 0.1": Quantization("int8", "smoothquant", 0.1),
    "smoothquant, 0.5": Quantization("int8", "smoothquant", 0.5),
}
Row = dict[str, float | str]


class Ranges(TorchFunctionMode):
    """Notes the largest |x| of every channel that a linear layer reads, and which input it was."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[int, Tensor] = {}
        self.inputs: dict[int, int] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch._C._nn.linear:
            x, weight = args[0], id(args[1])
            found = x.detach().abs().flatten(0, -2).amax(0)
            held = self.largest.get(weight)
            self.largest[weight] = found if held is None else torch.maximum(held, found)
            self.inputs[weight] = x.data_ptr()
        return function(*args, **(kwargs or {}))


def smooth_vectors(model: nn.Module, ranges: Ranges, how: Quantization) -> dict[str, Tensor]:
    """Return the vector of each linear layer; layers that read one input share it."""
    layers = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in ranges.largest
    }
    found = {}
    for name, weight in layers.items():
        same = [w for w in layers.values() if ranges.inputs[id(w)] == ranges.inputs[id(weight)]]
        largest = torch.stack([w.detach().abs().amax(0) for w in same]).amax(0)
        assert how.smooth is not None
        assert how.alpha is not None
        found[name] = smooth_vector(ranges.largest[id(weight)], largest, how.smooth, how.alpha)
    return found


def plan_of(report: Any, how: Quantization, vectors: dict[str, Tensor], sparse: bool) -> Plan:
    """Return a plan that quantises every projection but the head, and keeps 2:4 or nothing."""
    sites, tensors = {}, {}
    for site in report.sites:
        settings = site.decision.settings if sparse else None
        choice = settings or (site.decision.reason or "kept dense")
        kept = "heads stay in 16 bit" if site.role == "head" else how
        sites[site.name] = PlannedSite(site.shape, choice, kept)
        if how.smooth and site.role != "head":
            tensors[site.name] = {"smooth": vectors[site.name]}
    return Plan(sites, {}, tensors=PlanTensors(tensors))


def cases(model: nn.Module, ranges: Ranges, tokens: Tensor) -> dict[str, dict[str, Any]]:
    """Return every case, by its name."""
    report = explain(model, tokens)
    found: dict[str, dict[str, Any]] = {"2:4": {}}
    for name, how in SMOOTHINGS.items():
        vectors = smooth_vectors(model, ranges, how) if how.smooth else {}
        found[f"W8A8, {name}"] = {"plan": plan_of(report, how, vectors, sparse=False)}
        found[f"W8A8 + 2:4, {name}"] = {"plan": plan_of(report, how, vectors, sparse=True)}
    return dict(sorted(found.items(), key=lambda item: ("2:4" in item[0], item[0])))


def row(name: str, found: Evaluation) -> Row:
    """Return what is stored of one case."""
    assert found.delta is not None
    moments = {"dnll": found.delta, "kl": found.kl, "top1": found.top1}
    values = {key: one.mean for key, one in moments.items()}
    return {"case": name, **values, **{f"{key}_se": one.error for key, one in moments.items()}}


@torch.inference_mode()
def main() -> None:
    """Measure every case on the same text and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--windows", type=int, default=96, help="windows of 512 tokens")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with Ranges() as ranges:
        for batch in windows_of("train", 32, seed=1).split(BATCH):
            model(batch)
    held = windows_of("heldout", arguments.windows)
    found = evaluate_cases(model, held.split(BATCH), cases(model, ranges, held[:1]))
    rows = [row(name, one) for name, one in found.items()]
    shown = Table("case", "ΔNLL", "± SE", "KL", "± SE", "top-1")
    for one in rows:
        numbers = (f"{one[key]:.5f}" for key in ("dnll", "dnll_se", "kl", "kl_se"))
        shown.add_row(str(one["case"]), *numbers, f"{one['top1']:.2%}")
    Console(width=100).print(shown, "; ".join(f"{k}: {v}" for k, v in machine().items()))
    if arguments.json:
        result = {"machine": machine(), "windows": arguments.windows, "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
