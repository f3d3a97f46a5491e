"""Small random models of many architectures, built from their configs: nothing is downloaded.

    model, inputs = ZOO["llama"].build();   model(**inputs)

Two layers, two sequences of 32 tokens. Every width that a projection reads is a multiple of 32, so
any N:M pattern fits. Hidden, middle and attention widths differ where the architecture lets them,
so a mix-up shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

BATCH, TOKENS, VOCAB = 2, 32, 96


@dataclass(frozen=True)
class Model:
    """One model: its transformers ``model_type`` and the config values that make it small."""

    model_type: str
    config: Mapping[str, Any]
    masked: bool = False  # a masked LM (an encoder) instead of a causal LM
    dtype: torch.dtype = torch.float32
    options: Mapping[str, str] = field(default_factory=dict)  # experts_implementation and the like

    def build(self, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model in eval mode, and the keyword arguments of one call."""
        torch.manual_seed(seed)
        auto = AutoModelForMaskedLM if self.masked else AutoModelForCausalLM
        config = AutoConfig.for_model(self.model_type, **self.config)
        create: Callable[..., nn.Module] = auto.from_config
        model = create(config, dtype=self.dtype, **self.options).eval()
        unsettle(model)
        return model, {"input_ids": torch.randint(3, VOCAB, (BATCH, TOKENS))}


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Make the outcome depend on every parameter of ``model``.

    A fresh matrix is so small (0.02) that its layer hardly moves the residual stream: it gets about
    unit gain. A fresh bias or norm weight is all zeros or ones, so nobody would miss it: it gets
    noise.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        else:
            parameter.mul_(5)


BF16 = torch.bfloat16
TOKEN_IDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASE = TOKEN_IDS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GQA = BASE | {"num_key_value_heads": 2}
WIDE = GQA | {"head_dim": 32}  # attention is 128 wide, the residual stream 64
SLIDING = WIDE | {"sliding_window": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
DEEPSEEK = BASE | MLA | EXPERTS | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MIXTRAL = GQA | EXPERTS
GPT_OSS = SLIDING | EXPERTS
SHARED = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 160}

ZOO: dict[str, Model] = {
    # decoders with split projections
    "llama": Model("llama", WIDE),
    "llama_tied": Model("llama", WIDE | {"tie_word_embeddings": True}),
    "llama_bf16": Model("llama", WIDE, dtype=BF16),
    "llama_biased": Model("llama", WIDE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": Model("mistral", SLIDING),
    "qwen2": Model("qwen2", GQA),
    "qwen3": Model("qwen3", WIDE),
    "gemma2": Model("gemma2", SLIDING),
    "gemma3": Model("gemma3_text", SLIDING),
    "olmo2": Model("olmo2", GQA),
    "cohere": Model("cohere", GQA),
    "granite": Model("granite", GQA | {"residual_multiplier": 0.5}),
    "starcoder2": Model("starcoder2", GQA),
    "opt": Model("opt", BASE | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    # decoders with fused projections
    "phi3": Model("phi3", GQA),
    "phi3_bf16": Model("phi3", GQA, dtype=BF16),
    "glm4": Model("glm4", WIDE),
    "gpt2": Model("gpt2", TOKEN_IDS | GPT2),
    "gpt2_bf16": Model("gpt2", TOKEN_IDS | GPT2, dtype=BF16),
    "gpt_neox": Model("gpt_neox", BASE),
    "falcon": Model("falcon", BASE | FALCON),
    "falcon_multi_query": Model("falcon", BASE | {"bias": True}),
    # mixtures of experts
    "mixtral": Model("mixtral", MIXTRAL),
    "mixtral_eager": Model("mixtral", MIXTRAL, options={"experts_implementation": "eager"}),
    "mixtral_batched": Model("mixtral", MIXTRAL, options={"experts_implementation": "batched_mm"}),
    "mixtral_bf16": Model("mixtral", MIXTRAL, dtype=BF16),
    "qwen2_moe": Model("qwen2_moe", GQA | SHARED),
    "qwen3_moe": Model("qwen3_moe", WIDE | EXPERTS),
    "deepseek_v3": Model("deepseek_v3", DEEPSEEK),
    "gpt_oss": Model("gpt_oss", GPT_OSS),
    "gpt_oss_bf16": Model("gpt_oss", GPT_OSS, dtype=BF16),
    # encoders
    "bert": Model("bert", BASE, masked=True),
}
