"""``generate`` and pipelines: what compiles the prefill, what does not, and what is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from emulate import sparsified
from hf_models import OPTIONS, SHIPPED, new_llama, phases, planned, reasons, tokens
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    T5Config,
    pipeline,
)
from zoo import BASE

from amber_compile import last_reports

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
SPARSE_PREFILL, DECODE = ("prefill", True), ("decode", False)


def logits(model: nn.Module, ids: Tensor, **options: Any) -> list[Tensor]:
    """Return the logits of every step of ``generate``, the first token of each sequence padded."""
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    every = GREEDY | {"output_logits": True, "return_dict_in_generate": True} | options
    return list(model.generate(ids, attention_mask=mask, **every).logits)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other)) and len(one) == len(other)


# ---- pipelines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(SHIPPED, padding_side="left")
    found.pad_token = found.pad_token or found.eos_token
    return found


def reader(tokenizer: Any) -> nn.Module:
    """Return a model that knows the tokens of ``tokenizer``."""
    return new_llama(vocab_size=len(tokenizer), eos_token_id=None)[0]


def test_a_pipeline_runs_the_compiled_model(tokenizer: Any) -> None:
    prompts = ["import os\n\n\ndef f(x):", "class Point:\n    def __init__(self, x):\n        self"]
    model = reader(tokenizer)
    options = GREEDY | {"batch_size": len(prompts), "return_tensors": True}

    def written() -> list[Any]:
        made = pipeline("text-generation", model=model, tokenizer=tokenizer)
        made.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
        return [one[0]["generated_token_ids"] for one in made(prompts, **options)]

    dense = written()
    with sparsified(model, planned(model, n=1)):
        expected = written()
    model.compile(backend="amber_eager", options=OPTIONS | {"pattern": "1:4"})
    assert written() == expected
    assert expected != dense
    assert phases()[0] == SPARSE_PREFILL
    assert set(phases()[1:]) == {DECODE}


@pytest.mark.filterwarnings("ignore")  # transformers does not know an OptimizedModule
def test_a_pipeline_of_torch_compiles_wrapper_compiles_nothing(tokenizer: Any) -> None:
    model = torch.compile(reader(tokenizer), backend="amber_eager")
    pipeline("text-generation", model=model, tokenizer=tokenizer)("x = ", max_new_tokens=2)
    assert last_reports() == []


def test_a_feature_extraction_pipeline_is_prefill(tokenizer: Any) -> None:
    model = reader(tokenizer).model
    extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    with sparsified(model, planned(model)):
        expected = extract("x = [1, 2, 3]")
    model.compile(backend="amber_eager", options=OPTIONS)
    assert extract("x = [1, 2, 3]") == expected
    assert phases() == [SPARSE_PREFILL]


# ---- CompileConfig -------------------------------------------------------------------------------


def compile_config(anywhere: bool = True, **options: Any) -> CompileConfig:
    """Return one that compiles on a CPU too, where ``generate`` otherwise does not."""
    config = CompileConfig(backend="amber_eager", **options)
    config._compile_all_devices = anywhere  # transformers' own tests do so
    return config


@pytest.mark.parametrize(
    ("anywhere", "cache", "chunk", "compiled"),
    [
        (False, "static", None, []),
        (False, "static", 8, []),
        (True, "dynamic", None, []),
        (True, "dynamic", 8, []),
        (True, "static", None, [DECODE]),
        (True, "static", 8, [SPARSE_PREFILL, DECODE]),
    ],
)
def test_what_a_compile_config_compiles(
    anywhere: bool, cache: str, chunk: int | None, compiled: list[tuple[str, bool]]
) -> None:
    model, _ = new_llama()
    model.generation_config.prefill_chunk_size = chunk
    options = {"cache_implementation": cache, "compile_config": compile_config(anywhere)}
    logits(model, tokens(), **options)
    assert sorted(set(phases()), reverse=True) == compiled


def test_chunked_prefill_is_as_sparse_as_the_whole() -> None:
    model, _ = new_llama()
    model.generation_config.prefill_chunk_size = 8
    ids = tokens(batch=2)
    with sparsified(model, planned(model)):
        expected = logits(model, ids, cache_implementation="static")
    config = compile_config(mode=None, options=OPTIONS)
    result = logits(model, ids, cache_implementation="static", compile_config=config)
    assert same(result, expected)
    assert SPARSE_PREFILL in phases()


def test_options_of_a_compile_config_want_no_mode() -> None:
    model, _ = new_llama()
    config = compile_config(options=OPTIONS)  # its mode is "reduce-overhead" by default
    with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
        logits(model, tokens(), cache_implementation="static", compile_config=config)


def test_a_compiled_model_does_not_care_what_generate_compiles_it_with() -> None:
    given: list[GraphModule] = []

    def other(gm: GraphModule, inputs: list[Any]) -> Any:
        given.append(gm)
        return gm.forward

    config = CompileConfig(backend=other, mode=None)
    config._compile_all_devices = True
    model, _ = new_llama()
    model.compile(backend="amber_eager", options=OPTIONS)
    logits(model, tokens(), cache_implementation="static", compile_config=config)
    assert set(phases()) == {SPARSE_PREFILL, DECODE}
    assert given == []


# ---- dtypes, modes, encoders ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        ("auto", torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_a_model_loaded_in_any_dtype(tmp_path: Path, dtype: Any, loaded: torch.dtype) -> None:
    new_llama()[0].to(torch.bfloat16).save_pretrained(tmp_path)
    options = {"dtype": dtype} if dtype else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **options)
    assert model.dtype is loaded
    ids = tokens(batch=2)
    with sparsified(model.eval(), planned(model)):
        expected = logits(model, ids)
    model.compile(backend="amber_eager", options=OPTIONS)
    assert same(logits(model, ids), expected)
    assert phases()[0] == SPARSE_PREFILL


def test_inference_mode_and_no_grad_compute_the_same() -> None:
    model, inputs = new_llama()
    with torch.no_grad(), sparsified(model, planned(model)):
        expected = model(**inputs).logits
    model.compile(backend="amber_eager", options=OPTIONS)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(model(**inputs).logits, expected)
    assert phases() == [SPARSE_PREFILL] * 2


def test_the_prefill_of_an_encoder_decoder_is_its_encoder() -> None:
    torch.manual_seed(0)
    small = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "decoder_start_token_id": 0}
    config = T5Config(**small, vocab_size=BASE["vocab_size"], num_heads=4)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.compile(backend="amber_eager")
    model.generate(tokens(), max_new_tokens=2)
    assert set(phases()) == {DECODE}  # generate calls the encoder by itself
    graphs = len(phases())
    model.get_encoder().compile(backend="amber_eager")
    model.generate(tokens(), max_new_tokens=2)
    assert SPARSE_PREFILL in phases(since=graphs)
    assert "rule: the name says no role; list it in projections= to sparsify it" not in reasons()
