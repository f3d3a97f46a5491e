"""``generate``: prompts of many lengths, both caches, and decode as the dense backend does it."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from emulate import Settings, sparsified
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import Cache, DynamicCache, StaticCache
from zoo import WIDE, Model

from amber_compile import last_reports

LENGTHS = (31, 24, 16, 9, 5)
BATCHES = range(1, 9)
NEW_TOKENS = 3
SITES = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
OPTIONS = {"correction": None}


def new_llama() -> nn.Module:
    """Return one layer, with an attention that computes the same when it is not compiled."""
    model, _ = Model("llama", WIDE | {"num_hidden_layers": 1}).build()
    model.set_attn_implementation("eager")
    return model


def prompt(batch: int, length: int) -> dict[str, Tensor]:
    """Return random tokens, the first prompt padded on its left by a third of its length."""
    ids = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: nn.Module, cache: str) -> list[tuple[Tensor, ...]]:
    """Return the logits of every step, for all batch sizes and prompt lengths."""
    results = []
    for batch, length in product(BATCHES, LENGTHS):
        output = model.generate(
            **prompt(batch, length),
            cache_implementation=cache,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        results.append(output.logits)
    return results


def plain_graphs(cache: str) -> int:
    """Return how many graphs a backend that only counts is given."""
    graphs: list[GraphModule] = []

    def count(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    model = new_llama()
    model.forward = torch.compile(model.forward, backend=count)
    generated(model, cache)
    torch._dynamo.reset()
    return len(graphs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_is_sparse_in_prefill_only_and_compiles_no_graph_more(cache: str) -> None:
    graphs = plain_graphs(cache)
    model = new_llama()
    sites = {f"model.layers.0.{site}": Settings(2, 4) for site in SITES}
    with sparsified(model, sites):
        expected = generated(model, cache)
    model = new_llama()
    model.forward = torch.compile(model.forward, backend="amber_eager", options=OPTIONS)
    results = generated(model, cache)
    for result, one in zip(results, expected, strict=True):
        assert all(map(torch.equal, result, one))
    assert len(last_reports()) == graphs
    for report in last_reports():
        assert (report.graphs[0].phase == "prefill") == (report.coverage > 0)


@torch.no_grad()
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_decode_is_the_dense_backends_bit_for_bit(cache: type[Cache], inductor: None) -> None:
    model = new_llama()
    tokens = prompt(2, 12)
    size = {"max_cache_len": 16} if cache is StaticCache else {}
    filled = cache(config=model.config, **size)
    torch.compile(model, backend="amber_eager")(**tokens, past_key_values=filled)

    def decode(backend: str) -> list[Tensor]:
        """Return the logits of three steps from a copy of the cache, and its keys after them."""
        torch._dynamo.reset()
        run = torch.compile(model, backend=backend)
        past, mask, results = copy.deepcopy(filled), tokens["attention_mask"], []
        ids = torch.tensor([[5], [7]])
        for _ in range(3):
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            results.append(run(input_ids=ids, attention_mask=mask, past_key_values=past).logits)
            ids = results[-1].argmax(-1)
        return [*results, past.layers[0].keys]

    assert all(map(torch.equal, decode("amber"), decode("inductor")))
    assert {report.graphs[0].phase for report in last_reports()[1:]} == {"decode"}


def test_generate_of_a_compiled_model_compiles_nothing_but_model_compile_does() -> None:
    model = new_llama()
    tokens = prompt(1, 8) | {"max_new_tokens": 2, "do_sample": False}
    torch.compile(model, backend="amber_eager").generate(**tokens)
    assert last_reports() == []  # ``generate`` is the original model's
    model.compile(backend="amber_eager")
    model.generate(**tokens)
    assert [report.graphs[0].phase for report in last_reports()] == ["prefill", "decode"]
