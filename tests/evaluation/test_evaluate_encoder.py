"""Sentence embeddings, dense and sparse."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from zoo import BASE, VOCAB, unsettle

from amber_compile import Report
from amber_compile.errors import OptionError
from amber_compile.evaluation import encoder as module
from amber_compile.evaluation import evaluate_encoder
from amber_compile.evaluation.encoder import (
    compare_embeddings,
    embed,
    evaluate_encoder_cases,
    neighbours,
)

QUIET: dict[str, Any] = {"progress": False}
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **BASE | {"num_hidden_layers": 1})
    model: nn.Module = AutoModel.from_config(config).eval()
    unsettle(model)
    return model


@pytest.fixture(scope="module")
def sentences() -> list[dict[str, Tensor]]:
    """Seven sentences of two lengths, in three batches, padded on the right."""
    found = []
    for count, length in ((3, 12), (2, 20), (2, 12)):
        tokens = torch.randint(3, VOCAB, (count, length), generator=GENERATOR)
        mask = torch.ones_like(tokens)
        mask[0, length // 2 :] = 0
        found.append({"input_ids": tokens * mask, "attention_mask": mask})
    return found


def embeddings(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the means over the tokens that are no padding, one sentence at a time."""
    found = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            for states, mask in zip(hidden, batch["attention_mask"], strict=True):
                found.append(states[mask.bool()].double().mean(0))
    return torch.stack(found)


def test_cosines_and_neighbours_of_the_compiled_model(
    bert: nn.Module, sentences: list[dict[str, Tensor]]
) -> None:
    options: dict[str, Any] = {"projections": ["*.query", "*.intermediate.dense"]}
    cases = {"some": options, "all": {"pattern": "4:4"}}
    found = evaluate_encoder_cases(bert, iter(sentences), cases, **QUIET)
    a = embeddings(bert, sentences)
    run = torch.compile(bert, backend="amber_eager", options=options, dynamic=True)
    b = embeddings(run, sentences)
    cosine = nn.functional.cosine_similarity(a, b)
    one = found["some"]
    assert one.sentences == 7
    assert one.distance.mean == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    assert one.distance.error == pytest.approx(float(cosine.std() / 7**0.5), rel=1e-3)
    assert one.largest == pytest.approx(float((1 - cosine).max()), rel=1e-4)
    near = []
    for each in (a, b):
        unit = nn.functional.normalize(each, dim=1)
        near.append((unit @ unit.T).fill_diagonal_(-2).argmax(1))
    assert one.nearest.mean == pytest.approx(float((near[0] == near[1]).double().mean()))
    assert 0 < one.coverage < 1
    assert found["all"].nearest.mean == 1
    assert found["all"].distance.mean == pytest.approx(0, abs=2**-20)
    assert "same nearest sentence" in str(one)
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["coverage"] == {
        "macs": one.coverage
    }


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_a_sentence_is_not_its_own_neighbour(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    points = nn.functional.normalize(torch.tensor([[1, 0.0], [1, 0.1], [0, 1], [0.1, 1], [1, 1]]))
    assert neighbours(points).tolist() == [1, 0, 3, 2, 1]


def test_embeddings_have_length_one() -> None:
    class Output:
        last_hidden_state = torch.randn(2, 3, 4, generator=GENERATOR)

    found = embed(Output, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert torch.allclose(found.norm(dim=1), torch.ones(2))
    first = nn.functional.normalize(Output.last_hidden_state[0, :2].mean(0), dim=0)
    assert torch.allclose(found[0], first)
    assert torch.equal(embed(Output, None)[1], found[1])


def test_an_embedding_that_is_not_finite_is_told() -> None:
    dense = nn.functional.normalize(torch.randn(4, 8, generator=GENERATOR))
    sparse = dense.clone()
    sparse[2] = math.nan
    found = compare_embeddings(dense, sparse, Report())
    assert found.bad == (0, 1)
    assert math.isnan(found.distance.mean)
    assert found.nearest.mean < 1
    assert found.to_json()["distance"] == "nan"
    assert "0 dense, 1 sparse" in str(found)


def test_what_is_no_encoder_or_no_text(
    bert: nn.Module, llama: nn.Module, sentences: list[dict[str, Tensor]]
) -> None:
    with pytest.raises(OptionError, match="fewer than two sentences"):
        evaluate_encoder(bert, [], **QUIET)
    with pytest.raises(OptionError, match="returns no last_hidden_state"):
        evaluate_encoder(llama, sentences, **QUIET)
    with pytest.raises(OptionError, match="did you mean 'pattern'"):
        evaluate_encoder(bert, sentences, patern="2:4")
