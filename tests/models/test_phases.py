"""Prefill is sparse, decode is dense: for every causal model, with the caches of transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulate import Settings, sparsified
from expected import EXPECTED, GATE, SPARSE
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from zoo import TOKENS, ZOO

import amber_compile
from amber_compile import Report
from amber_compile.report import clear_reports

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"  # transformers' MoE
)
OPTIONS = {"preset": "paper", "score": "weight_norm"}
VARIANTS = ("_bf16", "_tied", "_biased")  # same graphs as the model they vary
CAUSAL = [name for name, one in ZOO.items() if not (one.masked or name.endswith(VARIANTS))]
KINDS = ["llama", "gpt2", "gemma3", "deepseek_v3", "gpt_oss"]
"""Keys and values; packed ones; sliding windows; latent ones; attention sinks."""
DECODE = [(name, "dynamic") for name in CAUSAL] + [(name, "static") for name in KINDS]


def make_cache(kind: str, model: Any) -> Any:
    """Return an empty cache for ``model``."""
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=TOKENS + 8)


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model whose attention adds its mask: what else it does depends on who traces it."""
    options = {**ZOO[name].options, "attn_implementation": "eager"}
    return replace(ZOO[name], options=options).build()


def compiled(model: nn.Module) -> Any:
    amber_compile.register_model(model)
    return torch.compile(model, backend="amber_eager", options=OPTIONS)


def report() -> Report:
    """Return what was reported since the last call."""
    merged = Report.merge(amber_compile.last_reports())
    clear_reports()
    return merged


def rule_of(name: str) -> dict[str, Settings]:
    """Return the settings of the projections that the rule sparsifies."""
    part = {SPARSE: None, GATE: "gate"}
    return {
        site: Settings(2, 4, "weight_norm", part=part[outcome])
        for site, outcome in EXPECTED[name].items()
        if outcome in part
    }


@pytest.mark.parametrize(("name", "kind"), DECODE)
@torch.no_grad()
def test_decode_is_dense_and_bit_for_bit_the_models(name: str, kind: str) -> None:
    """Two sequences: neither the batch nor the length of the cache counts as tokens."""
    model, inputs = build(name)
    prompt, token = inputs["input_ids"].split([TOKENS - 1, 1], dim=1)
    cache = make_cache(kind, model)
    model(input_ids=prompt, past_key_values=cache)
    dense = copy.deepcopy(cache)
    logits = compiled(model)(input_ids=token, past_key_values=cache).logits
    sites = report().sites
    assert {site.name for site in sites} == EXPECTED[name].keys()
    assert not any(site.decision.sparse for site in sites)
    reasons = {site.decision.reason for site in sites if site.name in rule_of(name)}
    assert reasons == {"decode: one token a sequence"}
    assert torch.equal(logits, model(input_ids=token, past_key_values=dense).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_prefill_into_a_cache_is_sparse_and_what_follows_dense(name: str, kind: str) -> None:
    """One sequence; lm_head reads its last token only, as in ``generate``."""
    model, inputs = build(name)
    prompt = inputs["input_ids"][:1]
    fast = compiled(model)
    cache, expected_cache = make_cache(kind, model), make_cache(kind, model)
    logits = fast(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
    prefill = report()
    assert {graph.phase for graph in prefill.graphs} == {"prefill"}
    assert {site.name for site in prefill.sites if site.decision.sparse} == rule_of(name).keys()
    with sparsified(model, rule_of(name)):
        call = {"past_key_values": expected_cache, "logits_to_keep": 1}
        expected = model(input_ids=prompt, **call).logits
    assert torch.equal(logits, expected)
    token = expected.argmax(-1)
    logits = fast(input_ids=token, past_key_values=cache).logits
    assert torch.equal(logits, model(input_ids=token, past_key_values=expected_cache).logits)
    decode = report()
    assert {graph.phase for graph in decode.graphs} == {"decode"}
    assert not any(site.decision.sparse for site in decode.sites)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "mixtral", "deepseek_v3"])
@torch.no_grad()
def test_one_graph_serves_every_length_of_prompt(name: str) -> None:
    model, inputs = build(name)
    fast = torch.compile(model, backend="amber_eager", options=OPTIONS, dynamic=True)

    def check(ids: Tensor) -> None:
        with sparsified(model, rule_of(name)):
            expected = model(input_ids=ids).logits
        assert torch.equal(fast(input_ids=ids).logits, expected)

    check(inputs["input_ids"])
    assert len(report().graphs) == 1
    check(inputs["input_ids"][:, :23].contiguous())
    assert report().graphs == []
