"""What the paper's rule makes of every linear of every model in the zoo, written down by hand.

down_proj always; q_proj and gate_proj; nothing else (Amber Pruner, arXiv 2508.02128). Of a
projection that is gate and up in one, the gate half.
"""

from __future__ import annotations

from collections.abc import Mapping

SPARSE = "sparse"
GATE = "sparse, the gate half only"

# What the reason must contain, for the linears that stay dense.
KEY, VALUE, OUT, UP = (f"{name}_proj stays dense" for name in ("k", "v", "o", "up"))
HEAD = "heads stay dense"
ROUTER = "routers stay dense"
QKV = "q is fused with k and v"
HIDDEN_GATE = "the graph does not show where they part"
LATENT_QUERY = "low-rank query projections"
LATENT_KEY_VALUE = "low-rank key and value projections"
NO_ROLE = "the name says no role"
GATHERED = "its weight is the left operand"

Outcomes = Mapping[str, str]
LAYERS = 2


def layers(path: str, sites: Outcomes) -> dict[str, str]:
    """Return the same ``sites`` in every layer of ``path``."""
    return {f"{path}.{at}.{site}": what for at in range(LAYERS) for site, what in sites.items()}


HEADS = {"lm_head": HEAD}
ATTENTION = {
    "self_attn.q_proj": SPARSE,
    "self_attn.k_proj": KEY,
    "self_attn.v_proj": VALUE,
    "self_attn.o_proj": OUT,
}
GATED = {"mlp.gate_proj": SPARSE, "mlp.up_proj": UP, "mlp.down_proj": SPARSE}
EXPERTS = {"mlp.experts.gate_up_proj": GATE, "mlp.experts.down_proj": SPARSE}
ROUTED = {"mlp.gate": ROUTER, **EXPERTS}
LATENT = {
    "self_attn.q_a_proj": LATENT_QUERY,
    "self_attn.q_b_proj": LATENT_QUERY,
    "self_attn.kv_a_proj_with_mqa": LATENT_KEY_VALUE,
    "self_attn.kv_b_proj": LATENT_KEY_VALUE,
    "self_attn.o_proj": OUT,
}
SHARED = {f"mlp.shared_experts.{name.removeprefix('mlp.')}": what for name, what in GATED.items()}

SHARED_GATED = {
    "mlp.shared_expert.gate_proj": SPARSE,
    "mlp.shared_expert.up_proj": UP,
    "mlp.shared_expert.down_proj": SPARSE,
    "mlp.shared_expert_gate": ROUTER,
}

LLAMA = layers("model.layers", ATTENTION | GATED) | HEADS
STARCODER = layers("model.layers", ATTENTION | {"mlp.c_fc": UP, "mlp.c_proj": SPARSE}) | HEADS
MIXTRAL = layers("model.layers", ATTENTION | ROUTED) | HEADS
OPT_LAYER = {
    "self_attn.q_proj": SPARSE,
    "self_attn.k_proj": KEY,
    "self_attn.v_proj": VALUE,
    "self_attn.out_proj": OUT,
    "fc1": UP,
    "fc2": SPARSE,
}
OPT = {
    "model.decoder.project_in": NO_ROLE,
    **layers("model.decoder.layers", OPT_LAYER),
    "model.decoder.project_out": NO_ROLE,
    **HEADS,
}
GLM4_LAYER = ATTENTION | {"mlp.gate_up_proj": GATE, "mlp.down_proj": SPARSE}
PHI3_LAYER = {
    "self_attn.qkv_proj": QKV,
    "self_attn.o_proj": OUT,
    "mlp.gate_up_proj": GATE,
    "mlp.down_proj": SPARSE,
}
GPT2_LAYER = {
    "attn.c_attn": QKV,
    "attn.c_proj": OUT,
    "mlp.c_fc": UP,
    "mlp.c_proj": SPARSE,
}
NEOX_LAYER = {
    "attention.query_key_value": QKV,
    "attention.dense": OUT,
    "mlp.dense_h_to_4h": UP,
    "mlp.dense_4h_to_h": SPARSE,
}
FALCON_LAYER = {
    "self_attention.query_key_value": QKV,
    "self_attention.dense": OUT,
    "mlp.dense_h_to_4h": UP,
    "mlp.dense_4h_to_h": SPARSE,
}
BERT_LAYER = {
    "attention.self.query": SPARSE,
    "attention.self.key": KEY,
    "attention.self.value": VALUE,
    "attention.output.dense": OUT,
    "intermediate.dense": UP,
    "output.dense": SPARSE,
}
PHI3 = layers("model.layers", PHI3_LAYER) | HEADS
GPT2 = layers("transformer.h", GPT2_LAYER) | HEADS
GPT_OSS_MLP = {
    "mlp.router": ROUTER,
    "mlp.experts.gate_up_proj": HIDDEN_GATE,  # gate and up rows alternate
    "mlp.experts.down_proj": SPARSE,
}
GPT_OSS = layers("model.layers", ATTENTION | GPT_OSS_MLP) | HEADS
BATCHED = {
    "mlp.gate": ROUTER,
    "mlp.experts.gate_up_proj": HIDDEN_GATE,
    "mlp.experts.down_proj": GATHERED,
}
DEEPSEEK = {
    f"model.layers.{at}.{site}": what
    for at, mlp in enumerate([GATED, ROUTED | SHARED])
    for site, what in (LATENT | mlp).items()
}

EXPECTED: dict[str, Outcomes] = {
    "llama": LLAMA,
    "llama_tied": LLAMA,
    "llama_bf16": LLAMA,
    "llama_biased": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "olmo2": LLAMA,
    "cohere": LLAMA,
    "granite": LLAMA,
    "starcoder2": STARCODER,
    "opt": OPT,
    "phi3": PHI3,
    "phi3_bf16": PHI3,
    "glm4": layers("model.layers", GLM4_LAYER) | HEADS,
    "gpt2": GPT2,
    "gpt2_bf16": GPT2,
    "gpt_neox": layers("gpt_neox.layers", NEOX_LAYER) | HEADS,
    "falcon": layers("transformer.h", FALCON_LAYER) | HEADS,
    "falcon_multi_query": layers("transformer.h", FALCON_LAYER) | HEADS,
    "mixtral": MIXTRAL,
    "mixtral_eager": layers("model.layers", ATTENTION | {"mlp.gate": ROUTER}) | HEADS,
    "mixtral_batched": layers("model.layers", ATTENTION | BATCHED) | HEADS,
    "mixtral_bf16": MIXTRAL,
    "qwen2_moe": layers("model.layers", ATTENTION | ROUTED | SHARED_GATED) | HEADS,
    "qwen3_moe": MIXTRAL,
    "deepseek_v3": DEEPSEEK | HEADS,
    "gpt_oss": GPT_OSS,
    "gpt_oss_bf16": GPT_OSS,
    "bert": layers("bert.encoder.layer", BERT_LAYER)
    | {"cls.predictions.transform.dense": HEAD, "cls.predictions.decoder": HEAD},
}

NEVER: dict[str, str] = {"mixtral_batched": "*.experts.*"}
"""Sites, by fnmatch, that no option makes sparse: each row has a weight of its own."""

FLAT = ("*.experts.*", "*.shared_expert.down_proj", "model.decoder.layers.*.fc[12]")
"""Sites whose input shows no sequence, so that ``dense_prefix`` cannot be kept to."""
