"""A whole vLLM engine with the pass, on a CPU, beside the same model under the backend."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_engine import MIN_TOKENS, NEW, PROMPTS
from zoo import unsettle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

WORKER = Path(__file__).with_name("vllm_engine.py")
LAYERS = 4
SPARSE = {"projections": ["*.gate_proj", "*.down_proj"]}  # what the rule says of fused projections
LONG, SHORT = PROMPTS


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).eval()
    unsettle(model)
    return model


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Return ``run(how)``: what the engine answers; its caches last as long as the module."""
    folder = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(folder / "model")
    environment = os.environ | {
        "AMBER_VLLM": json.dumps({"min_tokens": MIN_TOKENS}),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }

    def start(how):
        command = [sys.executable, str(WORKER), str(folder / "model")]
        done = subprocess.run(
            command, env=environment | {"AMBER_HOW": how}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return start


@pytest.fixture(scope="module")
def first(run):
    """Return what the first engine answers, which compiles everything."""
    return run("object")


@torch.no_grad()
def scores(model, prompt, **options):
    """Return what the engine calls scores, of the model as it is or under the backend."""
    run = torch.compile(model.forward, backend="amber_eager", options=options) if options else model
    logits = run(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]


@torch.no_grad()
def generated(model, prompt):
    """Return the tokens behind a sparse prefill and dense decoding."""
    model.compile(backend="amber_eager", options=SPARSE)
    found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    model._compiled_call_impl = None
    return found[0, len(prompt) :].tolist()


def test_an_engine_answers_as_the_backend_does(model, first):
    answers = first["answers"]
    ways = {"long": [(LONG, True)], "short": [(SHORT, False)]}
    ways["together"] = [(LONG, True), (SHORT, True)]  # one large batch: both are sparse
    for name, expected in ways.items():
        for answer, (prompt, is_sparse) in zip(answers[name], expected, strict=True):
            dense = scores(model, prompt)
            sparse = scores(model, prompt, **SPARSE)
            right, wrong = (sparse, dense) if is_sparse else (dense, sparse)
            got = torch.tensor(answer["scores"])
            assert (got - right).abs().max() < 1e-3 * (got - wrong).abs().max()
    assert answers["long"][0]["tokens"] == generated(model, LONG)


def test_one_piece_is_compiled_for_all_layers_between_the_first_and_the_last(first):
    ends = [f"layers.{layer}.mlp" for layer in (0, LAYERS - 1)]
    mlps = [[f"{mlp}.gate_up_proj", f"{mlp}.down_proj"] for mlp in ends]
    assert first["sites"] == [[], *mlps]


def test_the_pass_by_name(first, run):
    assert run("name") == first


def test_a_second_process_finds_the_compiled_graphs(first, run):
    second = run("object")
    assert second["answers"] == first["answers"]
    assert second["sites"] == []  # the pass did not run
