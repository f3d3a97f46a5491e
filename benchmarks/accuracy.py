"""What does N:M cost the shipped model?  Held-out loss of every pattern, score and correction.

    python benchmarks/accuracy.py [--json] [--windows 96]

All rows read the same windows of held-out text, so a row is the mean *difference* to the dense
model in nats per token, with the standard error over windows, and KL(dense ‖ sparse) per token.
Nothing is calibrated: every row is what ``torch.compile(model, backend="amber", options=...)``
does. The backend is ``amber_eager``, which rewrites the same graph and generates no code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import amber_compile

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "python-lm"
RESULTS = Path(__file__).with_name("results") / "accuracy.json"

PATTERNS = ("2:4", "4:8", "8:16")
CASES: dict[str, dict[str, object]] = {
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
    "2:4 all but the head": {"projections": ["*.layers.*"]},
    "2:4 q, gate, down and o": {"projections": ["*.[qo]_proj", "*.gate_proj", "*.down_proj"]},
    "2:4 first token dense": {"dense_prefix": 1},
}


def heldout(count: int) -> Tensor:
    """Return ``count`` windows of held-out tokens, chosen at random once and for all."""
    sys.path.insert(0, str(ROOT / "examples"))
    from python_corpus import documents
    from python_tokens import tokenize, windows

    found = windows(tokenize(documents("heldout"), AutoTokenizer.from_pretrained(MODEL)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return found[order[:count]]


def log_probabilities(model: Callable[[Tensor], object], tokens: Tensor, label: str) -> Tensor:
    """Return log p of the whole vocabulary after each token but the last."""
    batches = tqdm(tokens.split(4), desc=f"{label:<28}", leave=False)
    logits = [model(batch).logits[:, :-1] for batch in batches]  # type: ignore[attr-defined]
    return torch.cat(logits).log_softmax(-1)


def compare(dense: Tensor, sparse: Tensor, tokens: Tensor) -> dict[str, float]:
    """Return the loss difference with its standard error over windows, and the divergence."""
    target = tokens[:, 1:, None]
    difference = (dense - sparse).gather(-1, target).mean((1, 2))
    divergence = (dense.exp() * (dense - sparse)).sum(-1).mean()
    return {
        "dnll": difference.mean().item(),
        "se": (difference.std() / len(difference) ** 0.5).item(),
        "kl": divergence.item(),
    }


def measure(
    model: torch.nn.Module, dense: Tensor, tokens: Tensor, label: str, options: dict[str, object]
) -> dict[str, float | str]:
    """Return one row: the model under ``options`` beside the dense one."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="amber_eager", dynamic=False, options=options)
    row = compare(dense, log_probabilities(compiled, tokens, label), tokens)
    return {"case": label, **row, "coverage": amber_compile.last_reports()[-1].coverage}


@torch.inference_mode()
def main() -> None:
    """Measure every case on the same text and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--windows", type=int, default=96, help="windows of 512 tokens")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = heldout(arguments.windows)
    dense = log_probabilities(model, tokens, "dense")
    nll = -dense.gather(-1, tokens[:, 1:, None]).mean().item()
    cases = tqdm(CASES.items(), desc="cases")
    rows = [measure(model, dense, tokens, label, options) for label, options in cases]
    shown = Table("case", "ΔNLL", "± SE", "KL", "MACs covered", title=f"dense NLL {nll:.4f}")
    for row in rows:
        numbers = (f"{row[name]:.4f}" for name in ("dnll", "se", "kl"))
        shown.add_row(str(row["case"]), *numbers, f"{row['coverage']:.1%}")
    Console(width=100).print(shown, "; ".join(f"{k}: {v}" for k, v in machine().items()))
    if arguments.json:
        RESULTS.parent.mkdir(exist_ok=True)
        result = {"machine": machine(), "windows": len(tokens), "dense_nll": nll, "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
