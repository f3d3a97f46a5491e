"""Continuations of a sparse and of a dense prefill."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from amber_compile.errors import OptionError
from amber_compile.evaluation import evaluate
from amber_compile.evaluation.generation import compare_generation, greedy
from amber_compile.evaluation.side_by_side import config_of, sides

ALL: dict[str, Any] = {"projections": ["*.layers.*"]}


def test_dense_is_what_generate_writes(llama: nn.Module, batches: list[Tensor]) -> None:
    tokens = batches[0]
    with torch.no_grad():
        found = greedy(llama, llama, tokens, 6)
        written = llama.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert torch.equal(found, written[:, tokens.shape[1] :])


def test_sparse_is_what_generate_of_the_compiled_model_writes(
    own_llama: nn.Module, batches: list[Tensor]
) -> None:
    model, tokens = own_llama, batches[0]
    with sides(model, {"a": config_of(ALL)}) as (dense, sparse):
        found = greedy(sparse["a"], dense, tokens, 6)
        assert {graph.phase for graph in sparse["a"].report.graphs} == {"prefill"}
        plain = greedy(dense, dense, tokens, 6)
    model.forward = torch.compile(model.forward, backend="amber_eager", options=ALL)
    with torch.no_grad():
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert torch.equal(found, written[:, tokens.shape[1] :])
    assert not torch.equal(found, plain)


def test_keeping_everything_writes_the_same(llama: nn.Module, batches: list[Tensor]) -> None:
    found = evaluate(llama, batches[:1], pattern="4:4", generate=5, prompts=2, progress=False)
    one = found.generation
    assert one is not None
    assert (one.prompts, one.prompt_tokens, one.tokens) == (2, 24, 5)
    assert (one.equal, one.identical, one.first_difference) == (1, 1, 5)
    assert one.nll_sparse == one.nll_dense
    assert found.to_json()["sparse"]["generation"]["equal"] == 1
    assert "5 tokens written after 2 prompts of 24: 100.0%" in str(found)


class Scripted:
    """A model that writes given tokens, whatever it read."""

    def __init__(self, tokens: list[list[int]], likely: float = 5.0) -> None:
        self.tokens, self.likely, self.at = torch.tensor(tokens), likely, 0

    def __call__(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 8)
        self.at = self.at + 1 if "past_key_values" in _ else 0
        logits[:, -1].scatter_(1, self.tokens[:, self.at : self.at + 1], self.likely)

        class Output:
            past_key_values = self

        Output.logits = logits  # type: ignore[attr-defined]  # a cache that knows what is next
        return Output


def test_shares_and_first_differences() -> None:
    dense = [[1, 2, 3, 4], [1, 2, 3, 4]]
    sparse = [[1, 2, 7, 4], [1, 2, 3, 4]]
    scripts = {"dense": Scripted(dense), "sparse": Scripted(sparse)}

    def decode(**inputs: Any) -> Any:
        cache = inputs.get("past_key_values")
        return (cache or scripts["dense"])(**inputs)

    prompts = [torch.ones(2, 3, dtype=torch.long)]
    found = compare_generation(decode, scripts["sparse"], prompts, 4)
    assert found.equal == 7 / 8
    assert found.equal_se == pytest.approx(((1 / 4) ** 2 / 2 / 2) ** 0.5)
    assert found.identical == 1 / 2
    assert found.first_difference == (2 + 4) / 2


def test_the_dense_model_judges_both(batches: list[Tensor], llama: nn.Module) -> None:
    tokens = batches[0]
    with sides(llama, {"a": config_of(ALL)}) as (dense, sparse):
        found = compare_generation(dense, sparse["a"], [tokens], 4)
        for run, loss in ((sparse["a"], found.nll_sparse), (dense, found.nll_dense)):
            written = greedy(run, dense, tokens, 4)
            told = dense(input_ids=torch.cat([tokens, written], 1)).logits.log_softmax(-1)
            each = told[:, 23:-1].gather(-1, written[..., None])
            assert loss == pytest.approx(-float(each.mean()), rel=1e-5)


def test_the_prompt_leaves_room(own_llama: nn.Module, batches: list[Tensor]) -> None:
    own_llama.config.max_position_embeddings = 26
    asked: dict[str, Any] = {"skip": ["*"], "progress": False}
    found = evaluate(own_llama, batches[:1], generate=8, **asked).generation
    assert found is not None
    assert found.prompt_tokens == 18
    with pytest.raises(OptionError, match="generate=26 leaves no room for a prompt: 26 positions"):
        evaluate(own_llama, batches[:1], generate=26, **asked)


def test_models_that_do_not_write(batches: list[Tensor]) -> None:
    model, _ = ZOO["bert"].build()
    asked: dict[str, Any] = {"generate": 2, "skip": ["*"], "progress": False}
    with pytest.raises(OptionError, match="needs a causal language model"):
        evaluate(model, batches[:1], **asked)
    with pytest.raises(OptionError, match="needs a model that keeps a cache"):
        evaluate(model, batches[:1], kind="causal", **asked)
