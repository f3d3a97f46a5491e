"""The shipped language model: small, loadable, and really trained on Python."""

import ast
import json
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from python_corpus import documents
from python_tokens import END, tokenize, windows
from torch import Tensor
from train_python_lm import evaluate, new_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

SHIPPED = Path(__file__).parents[2] / "examples" / "python-lm"
LARGEST_WEIGHTS = 16_000_000  # bytes

# These change little between versions of Python. The loss on them, in nats a token, was measured
# on the sources of 3.6 to 3.13: between 2.37 and 2.46.
HELDOUT = {
    "copyreg.py",
    "email/contentmanager.py",
    "multiprocessing/connection.py",
    "sched.py",
    "secrets.py",
}
HELDOUT_LOSS = 2.6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout(tokenizer: Tokenizer) -> Tensor:
    """Eight windows, ``[8, 512]``, from all over ``HELDOUT``."""
    docs = [doc for doc in documents("heldout") if doc.path in HELDOUT]
    every = windows(tokenize(docs, tokenizer))
    return every[:: len(every) // 8][:8]


def test_weights_are_small_and_bf16() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= LARGEST_WEIGHTS
    assert AutoModelForCausalLM.from_pretrained(SHIPPED).dtype == torch.bfloat16


def test_configuration_names_no_machine_path() -> None:
    for file in SHIPPED.glob("*config.json"):
        values = str(json.loads(file.read_text()))
        assert "_name_or_path" not in values
        assert "'/" not in values


def test_linear_layers_read_a_multiple_of_64_channels(model: LlamaForCausalLM) -> None:
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert all(linear.in_features % 64 == 0 for linear in linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heldout_text_is_expected(heldout: Tensor, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=dtype).eval()
    assert evaluate(model, heldout) < HELDOUT_LOSS


def test_word_frequencies_or_random_weights_would_not_pass(heldout: Tensor) -> None:
    counts = Counter(heldout.flatten().tolist())
    shares = [n / heldout.numel() for n in counts.values()]
    assert -sum(p * math.log(p) for p in shares) > HELDOUT_LOSS + 1
    torch.manual_seed(0)
    assert evaluate(new_model().eval(), heldout[:1]) > HELDOUT_LOSS + 1


@pytest.mark.parametrize("depth", [0, 4, 8, 12])
def test_a_block_is_indented_deeper_than_its_header(
    model: LlamaForCausalLM, tokenizer: Tokenizer, depth: int
) -> None:
    enclosing = " " * (depth - 4) + "def check(value):\n" if depth else ""
    header = " " * depth + "if value is None:\n"
    assert next_tokens(model, tokenizer, enclosing + header)[0] == " " * (depth + 4)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("import os\n\nprint(os.", "path"),
        ("for key, value in items.items():\n    print(key,", " value"),
        ("if __name__ ==", ' "__'),
        ("    def test_add(self):\n        self.", "assertEqual"),
        ("if not isinstance(name,", " str"),
    ],
)
def test_idioms_are_known(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, expected: str
) -> None:
    assert expected in next_tokens(model, tokenizer, prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        'import os\n\ndef read_file(path):\n    """Read a file.',
        'def remove(path):\n    """Remove a file."""\n    if',
        "class Cache:\n    def get(self, key):\n        try:\n            return",
    ],
)
def test_continuations_are_python(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str
) -> None:
    inputs = tokenizer(END + prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0]
    lines = tokenizer.decode(tokens, skip_special_tokens=True).splitlines()
    assert parsed_lines(lines) >= prompt.count("\n") + 3
    assert len(set(tokens[-64:].tolist())) >= 10


def next_tokens(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> list[str]:
    """Return the three likeliest tokens after ``prompt``, best first."""
    with torch.no_grad():
        logits = model(**tokenizer(END + prompt, return_tensors="pt")).logits[0, -1]
    return [tokenizer.decode(token) for token in logits.topk(3).indices]


def parsed_lines(lines: list[str]) -> int:
    """Return how many leading lines are a Python program by themselves, at most."""
    for count in range(len(lines), 0, -1):
        with suppress(SyntaxError):
            ast.parse("\n".join(lines[:count]))
            return count
    return 0
