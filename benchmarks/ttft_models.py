"""The models of ``ttft.py``, with random weights, and the ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    StaticCache,
)

from amber_compile import AmberConfig

DEVIATION = 0.02
NEW_TOKENS = 64  # room in the cache behind the prompt

# ---- models --------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def configuration(name: str, size: str, layers: int | None = None) -> PretrainedConfig:
    """Return the configuration of a model: 8B and 7B as published, or small, or with few layers."""
    found = _published(name, size)
    if layers:
        found.num_hidden_layers = layers
    return found


def _published(name: str, size: str) -> PretrainedConfig:
    if name == "llama":  # Llama-3.1-8B
        whole: dict[str, Any] = {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        return LlamaConfig(**(whole if size == "full" else SMALL), max_position_embeddings=131072)
    whole = {  # Qwen2-7B
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    return Qwen2Config(**(whole if size == "full" else SMALL), max_position_embeddings=131072)


@torch.no_grad()
def build(config: PretrainedConfig, device: torch.device) -> nn.Module:
    """Return a model of random weights in bf16, drawn on the device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.normal_(0, DEVIATION, generator=generator)
        else:
            parameter.fill_(1)  # of a norm
    with device:  # its buffers hold constants, which are lost on meta
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


# ---- ways to run them ----------------------------------------------------------------------------

MODELS = ("llama", "qwen2")
WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compile": {"backend": "inductor"},
    "amber": {"backend": "amber"},
    "amber W8A8": {"backend": "amber", "options": {"quantize": "int8", "projections": ()}},
    "amber int8": {"backend": "amber", "options": {"quantize": "int8"}},
    "amber int8 decode": {
        "backend": "amber",
        "options": {"quantize": "int8", "decode": "int8"},
    },
    "amber fp8": {"backend": "amber", "options": {"quantize": "fp8"}},
}


def why_not(way: str) -> str | None:
    """Return why a way cannot run in this version, or None."""
    options = (WAYS[way] or {}).get("options", {})
    known = {field.name for field in fields(AmberConfig)}
    missing = sorted(set(options) - known)
    return f"not available yet: no option {missing[0]!r}" if missing else None


def releases_weights(way: str) -> bool:
    """Return whether a model that was run in that way has lost its 16-bit weights."""
    return "decode" in (WAYS[way] or {}).get("options", {}) and why_not(way) is None


@dataclass
class Session:
    """One model run in one way: a prompt, and a step behind it."""

    run: Callable[..., Any]
    prompt: Tensor
    cache: StaticCache

    @classmethod
    def of(cls, model: nn.Module, way: str, prompt: Tensor) -> Session:
        """Compile the model, or leave it as it is."""
        torch.compiler.reset()
        arguments = WAYS[way]
        run = model if arguments is None else torch.compile(model, dynamic=False, **arguments)
        return cls(run, prompt, filled_cache(model, prompt))

    def prefill(self) -> Tensor:
        """Run the prompt; return the logits of the token after it."""
        logits: Tensor = self.run(input_ids=self.prompt, use_cache=False, logits_to_keep=1).logits
        return logits

    def rewind(self) -> None:
        """Put the cache back to where the prompt ends."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt.shape[1])

    def decode(self) -> Tensor:
        """Run one token behind the prompt."""
        token = self.prompt[:, :1]
        place = torch.full_like(token, self.prompt.shape[1])
        found = self.run(input_ids=token, position_ids=place, past_key_values=self.cache)
        logits: Tensor = found.logits
        return logits


def filled_cache(model: Any, prompt: Tensor) -> StaticCache:
    """Return a cache that holds random keys and values of a prompt, and has room behind them."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=prompt.shape[1] + NEW_TOKENS)
    cache.early_initialization(
        batch_size=len(prompt),
        num_heads=config.num_key_value_heads,
        head_dim=head,
        dtype=torch.bfloat16,
        device=prompt.device,
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache
