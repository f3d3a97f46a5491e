"""The quickstart, run as a user runs it: what it prints is true of the model that it was given."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from python_tokens import train_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = EXAMPLES / "python-lm"


def quickstart(*arguments: str, **environment: str) -> str:
    """Run the example from its folder's parent and return what it prints."""
    command = [sys.executable, "examples/quickstart.py", *arguments]
    done = subprocess.run(
        command,
        cwd=EXAMPLES.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def linears(folder: Path) -> set[str]:
    """Return the names of the linear layers of a saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    modules = model.named_modules()
    return {name for name, module in modules if isinstance(module, torch.nn.Linear)}


def rows(output: str) -> dict[str, str]:
    """Return the table: each projection with what it reads, and how or why."""
    table = re.findall(r"^(\S+) +\d+x\d+ +(.*?) *$", output, re.MULTILINE)
    return dict(table)


def perplexity(output: str, kind: str) -> float:
    found = re.search(rf"^  {kind} +([0-9.]+)$", output, re.MULTILINE)
    assert found, output
    return float(found[1])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a small random model of another architecture, and a tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    train_tokenizer(["def f(x):\n    return x\n"], vocabulary=512).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_shipped_model_is_prefilled_sparsely() -> None:
    output = quickstart("--documents", "3", "--tokens", "4")
    table = rows(output)
    outside = re.search(r"^Outside the compiled layers, so dense: (.*)$", output, re.MULTILINE)
    assert outside
    assert table.keys() | set(outside[1].split(", ")) == linears(SHIPPED)
    sparse = {name for name, how in table.items() if how.startswith("2:4 ")}
    assert {name.rpartition(".")[2] for name in sparse} == {"q_proj", "gate_proj", "down_proj"}
    assert len(sparse) == 3 * 8
    dense = perplexity(output, "dense")
    assert 5 < dense < perplexity(output, "sparse") < 1.5 * dense
    assert "written after a dense prefill" in output
    assert "written after a sparse prefill" in output


@pytest.mark.parametrize("parts", ["layers", "whole"])
def test_any_model_from_a_folder(tiny: Path, parts: str) -> None:
    arguments = ["--model", str(tiny), "--backend", "amber_eager", "--documents", "2"]
    whole = ["--whole"] if parts == "whole" else []
    output = quickstart(*arguments, *whole, "--tokens", "2", "--pattern", "1:4", "--preset=paper")
    table = rows(output)
    expected = linears(tiny) - (set() if whole else {"lm_head"})
    assert table.keys() == expected
    assert sum(re.match("1:4 +robust_norm", how) is not None for how in table.values()) == 3 * 3
    assert ("Outside the compiled layers" in output) is not bool(whole)
    # a random model knows nothing, and no less when it is sparse
    for kind in ("dense", "sparse"):
        assert math.log(perplexity(output, kind)) == pytest.approx(math.log(512), rel=0.05)


def test_identity_pattern_changes_nothing(tiny: Path) -> None:
    arguments = ["--model", str(tiny), "--backend", "amber_eager", "--documents", "2"]
    output = quickstart(*arguments, "--tokens", "8", "--pattern", "4:4")
    assert perplexity(output, "dense") == perplexity(output, "sparse")
    dense, sparse = output.split("── written after a ")[1:]
    assert dense.partition("──")[2] == sparse.partition("──")[2].rpartition("\n\n")[0] + "\n\n"


def test_without_a_compiler_the_graphs_run_as_they_are(tiny: Path) -> None:
    output = quickstart(
        "--model", str(tiny), "--documents", "2", "--tokens", "2", PATH="", CXX="none"
    )
    assert output.startswith("no C++ compiler (none): ")
