"""What each process of test_distributed_tp_plan.py does: models as transformers spreads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gated import decisions, fresh
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

import amber_compile

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
}
ALL = {"projections": ["*_proj"], "correction": "norm"}
DTYPES = {"llama": torch.float64, "mixtral": torch.float32}  # no grouped matmul of float64


def made(kind: str) -> PreTrainedModel:
    """Return a random model with four heads, and channels that 4 processes can share."""
    torch.manual_seed(0)
    if kind == "llama":
        config: Any = LlamaConfig(**SIZES)
    else:
        config = MixtralConfig(**{**SIZES, "num_hidden_layers": 1, "num_local_experts": 4})
    return AutoModelForCausalLM.from_config(config, dtype=DTYPES[kind]).eval()


def prompt() -> Tensor:
    """Return tokens [1, 12]."""
    drawn = torch.Generator().manual_seed(4)
    return torch.randint(0, VOCABULARY, (1, 12), generator=drawn)


@torch.inference_mode()
def answer(model: Any, options: dict[str, Any]) -> tuple[Tensor, dict[str, str], float]:
    """Return logits, decisions and coverage of ``model``, compiled as one graph."""
    fresh()
    model.compile(backend="amber_eager", options=options, fullgraph=True)
    logits = model(prompt(), use_cache=False).logits.clone()
    return logits, decisions(), amber_compile.last_reports()[-1].coverage


@torch.inference_mode()
def written(model: Any) -> tuple[list[int], dict[str, str]]:
    """Return what ``model`` writes, its layers compiled one by one, and what is decided."""
    fresh()
    model._compiled_call_impl = None
    amber_compile.register_model(model)
    options = {"projections": ["*"], "skip": ["model.layers.1.mlp.*"]}
    for layer in model.model.layers:
        layer.compile(backend="amber_eager", options=options, dynamic=True)
    ids = prompt()
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in tokens[0, ids.shape[1] :]], decisions()


def as_rank(
    rank: int, ranks: int, kind: str, saved: Path, options: dict[str, Any], write: bool
) -> tuple[Any, Any]:
    """Load the model as ``tp_plan="auto"`` spreads it and answer; write too, if asked."""
    from transformers.distributed import DistributedConfig

    spread = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        saved, dtype=DTYPES[kind], distributed_config=spread
    ).eval()
    weight = model.model.layers[0].self_attn.o_proj.weight
    assert list(weight.to_local().shape) == [64, 64 // ranks]
    found = answer(model, options)
    return found, written(model) if write else None
