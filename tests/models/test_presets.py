"""The models of the paper, by their published shapes: recognised, and covered to the decimal.

Built on the meta device: tens of billions of parameters that take no memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from amber_compile import AmberConfig, Projection, Settings
from amber_compile.rule import Rule, find_preset, layer_of, role_of

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}
PAPER = {
    "Llama-3.1-8B": (LLAMA, {19, 21, 28, 30, 31}, 56.1),
    "Qwen2-7B": (QWEN2, {0, 6, 23, 26, 27}, 57.6),
    "Qwen3-30B-A3B": (QWEN3_MOE, {41, 46, 47}, 56.9),
}
STRANGERS: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.3": {**LLAMA, "model_type": "mistral", "vocab_size": 32768},
    "a Llama-3.1-8B with 31 layers": {**LLAMA, "num_hidden_layers": 31},
    "a Llama-3.1-8B with 33 layers": {**LLAMA, "num_hidden_layers": 33},
    "a Llama-3.1-8B with more keys": {**LLAMA, "num_key_value_heads": 16},
    "a Qwen2-7B with 29 layers": {**QWEN2, "num_hidden_layers": 29},
    "Qwen2.5-Coder-like: another vocabulary": {**QWEN2, "vocab_size": 151936},
    "a Qwen3-30B-A3B with 64 experts": {**QWEN3_MOE, "num_experts": 64},
    "a Qwen3-30B-A3B with 47 layers": {**QWEN3_MOE, "num_hidden_layers": 47},
    "Llama-3.2-1B": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
Shapes = Mapping[str, tuple[int, ...]]


@functools.cache
def build(values: tuple[tuple[str, Any], ...]) -> tuple[Shapes, list[tuple[int, ...]]]:
    """Return a model's linears by name, and the shapes of all its parameters."""
    config = AutoConfig.for_model(**dict(values))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    linears = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in parameters.items()
        if parameter.dim() >= 2 and name not in embeddings
    }
    return linears, [tuple(parameter.shape) for parameter in parameters.values()]


def preset_of(config: Mapping[str, Any]) -> Any:
    return find_preset(*build(tuple(config.items())))


def share(config: Mapping[str, Any], rule: Rule) -> float:
    """Return the percentage of linear multiplications that the rule covers.

    Heads and routers are not counted: with its routers, Qwen3-30B-A3B would have 56.7.
    """
    total, covered = 0.0, 0.0
    for name, shape in build(tuple(config.items()))[0].items():
        if role_of(name) in ("head", "router"):
            continue
        active = config["num_experts_per_tok"] if len(shape) == 3 else 1
        macs = active * shape[-2] * shape[-1]
        total += macs
        covered += macs * _part(rule.choose(projection(name, shape)))
    return 100 * covered / total


def projection(name: str, shape: tuple[int, ...]) -> Projection:
    """Return what the pass would find: fused gates show, nodes do not matter to the rule."""
    rows = shape[-2] // 2 if name.endswith("gate_up_proj") else None
    nodes: Any = None
    return Projection(name, nodes, nodes, nodes, shape, False, "linear", gate_rows=rows)


def _part(choice: Settings | str) -> float:
    if isinstance(choice, str):
        return 0.0
    return 0.5 if choice.part == "gate" else 1.0


def dense_layers(config: Mapping[str, Any], rule: Rule, roles: Iterable[str]) -> set[int | None]:
    """Return the layers in which the projections of these roles stay dense."""
    return {
        layer_of(name)
        for name, shape in build(tuple(config.items()))[0].items()
        if role_of(name) in roles and isinstance(rule.choose(projection(name, shape)), str)
    }


@pytest.mark.parametrize("name", PAPER)
def test_a_model_of_the_paper_is_recognised_by_its_shapes(name: str) -> None:
    assert preset_of(PAPER[name][0]).name == name


@pytest.mark.parametrize("name", STRANGERS)
def test_a_model_of_almost_the_same_shapes_is_not(name: str) -> None:
    assert preset_of(STRANGERS[name]) is None


@pytest.mark.parametrize("name", PAPER)
def test_coverage_is_the_papers_to_the_decimal(name: str) -> None:
    config, _, expected = PAPER[name]
    rule = Rule(AmberConfig(preset="paper"), preset_of(config))
    assert round(share(config, rule), 1) == expected


@pytest.mark.parametrize(("config", "expected"), [(LLAMA, 61.5), (QWEN2, 63.8)])
def test_coverage_without_skipped_layers(config: dict[str, Any], expected: float) -> None:
    assert round(share(config, Rule(AmberConfig())), 1) == expected


@pytest.mark.parametrize("name", PAPER)
def test_q_and_gate_stay_dense_in_the_layers_of_the_paper_and_down_nowhere(name: str) -> None:
    config, layers, _ = PAPER[name]
    rule = Rule(AmberConfig(preset="paper"), preset_of(config))
    assert dense_layers(config, rule, {"q"}) == layers
    assert dense_layers(config, rule, {"gate", "expert gate+up"}) == layers
    assert dense_layers(config, rule, {"down", "expert down"}) == set()


def test_the_reason_names_the_layer_and_the_model() -> None:
    rule = Rule(AmberConfig(), preset_of(LLAMA))
    reason = rule.choose(projection("model.layers.19.self_attn.q_proj", (4096, 4096)))
    assert reason == "rule: the paper keeps q and gate of layer 19 of Llama-3.1-8B dense"


def test_experts_are_scored_without_robust_norm() -> None:
    """Tokens are routed, so an expert's statistics are its own (Amber Pruner, section 3)."""
    rule = Rule(AmberConfig(preset="paper"), preset_of(QWEN3_MOE))
    scores = {
        role_of(name): choice.score
        for name, shape in build(tuple(QWEN3_MOE.items()))[0].items()
        if isinstance(choice := rule.choose(projection(name, shape)), Settings)
    }
    assert scores == {
        "q": "robust_norm",
        "expert gate+up": "weight_norm",
        "expert down": "weight_norm",
    }
