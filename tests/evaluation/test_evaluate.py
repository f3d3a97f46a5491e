"""``evaluate``: the numbers of the logits, in constant memory, for every kind of model."""

import gc
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from zoo import VOCAB, ZOO

from amber_compile import last_reports
from amber_compile.errors import OptionError
from amber_compile.evaluation import Evaluation, evaluate, evaluate_cases
from amber_compile.evaluation.likelihoods import Sums, compare

QUIET: dict[str, Any] = {"progress": False}


@torch.no_grad()
def logits(model: nn.Module, batches: list[Tensor], **options: Any) -> Tensor:
    """Return the logits of all windows, of the compiled model if there are options."""
    torch._dynamo.reset()
    run = torch.compile(model, backend="amber_eager", options=options) if options else model
    return torch.cat([run(batch).logits for batch in batches])


def test_the_numbers_are_those_of_the_logits(
    llama: nn.Module, batches: list[Tensor], evaluated: Evaluation
) -> None:
    found = evaluated
    tokens = torch.cat(batches)
    dense, sparse = logits(llama, batches), logits(llama, batches, pattern="2:4")
    p, q = (each[:, :-1].double().log_softmax(-1) for each in (dense, sparse))
    losses = [-each.gather(-1, tokens[:, 1:, None])[..., 0].mean(1) for each in (p, q)]
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    assert (found.kind, found.windows, found.tokens) == ("causal", 6, 6 * 23)
    expected = [*losses, losses[1] - losses[0], kl, top1]
    values = [found.dense, found.sparse, found.delta, found.kl, found.top1]
    for value, each in zip(values, expected, strict=True):
        assert value is not None
        assert value.mean == pytest.approx(float(each.mean()), rel=1e-5)
        assert value.error == pytest.approx(float(each.std() / 6**0.5), rel=1e-4)
    assert found.coverage == pytest.approx(0.5, abs=0.15)
    assert found.removed == pytest.approx(found.coverage / 2)
    assert found.sites == (3, 8)
    assert found.bad == (0, 0)
    assert last_reports()[-1].coverage == found.coverage


def test_cases_share_the_dense_model(
    llama: nn.Module, batches: list[Tensor], evaluated: Evaluation
) -> None:
    calls = 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama

        def forward(self, input_ids: Tensor) -> Any:
            nonlocal calls
            if not torch.compiler.is_compiling():
                calls += 1
            return self.model(input_ids)

    cases: dict[str, dict[str, Any]] = {"2:4": {"pattern": "2:4"}, "all": {"pattern": "4:4"}}
    found = evaluate_cases(Counted(), batches, cases, kind="causal", **QUIET)
    assert calls == len(batches)
    assert found["2:4"] == evaluated  # again, and the same
    all_kept = found["all"]
    assert all_kept.dense == evaluated.dense
    assert all_kept.delta is not None
    assert (all_kept.delta.mean, all_kept.delta.error) == (0, 0)
    assert (all_kept.kl.mean, all_kept.top1.mean) == (0, 1)
    assert all_kept.removed == 0 < all_kept.coverage


def test_a_plan_decides(llama: nn.Module, batches: list[Tensor], tmp_path: Any) -> None:
    options: dict[str, Any] = {"projections": ["*.o_proj"], "pattern": "8:16"}
    logits(llama, batches[:1], **options)
    path = str(tmp_path / "a.plan")
    last_reports()[-1].plan().save(path)
    expected = evaluate(llama, batches[:1], **options, **QUIET)
    assert evaluate(llama, batches[:1], plan=path, **QUIET) == expected
    assert expected.sites == (1, 8)


def test_quantised_and_not_sparse(llama: nn.Module, batches: list[Tensor]) -> None:
    found = evaluate(llama, batches[:1], quantize="int8", skip=["*"], **QUIET)
    assert (found.coverage, found.quantized) == (0, 1)
    assert found.to_json()["coverage"]["quantized"] == 1
    assert 0 < found.kl.mean < 0.1
    assert "100.0% quantised" in str(found)


# ---- kinds of models -----------------------------------------------------------------------------


def test_a_masked_model_has_no_losses(batches: list[Tensor]) -> None:
    model, _ = ZOO["bert"].build()
    found = evaluate(model, batches[:1], **QUIET)
    assert found.kind == "masked"
    assert found.tokens == 3 * 24
    assert found.dense is found.sparse is found.delta is None
    assert found.kl.mean > 0
    facts = found.to_json()
    assert facts["dense"]["nll"] is facts["sparse"]["ppl"] is facts["sparse"]["nll_se"] is None
    assert "loss" not in str(found)


@pytest.mark.parametrize("name", ["gpt2_bf16", "mixtral_bf16", "gemma3", "gpt_oss", "opt"])
def test_the_kind_of_a_causal_model(name: str, batches: list[Tensor]) -> None:
    from amber_compile.evaluation.language_model import kind_of

    model, _ = ZOO[name].build()
    with torch.no_grad():
        assert kind_of(lambda **inputs: model(**inputs), batches[0]) == "causal"


def test_the_kind_can_be_said(llama: nn.Module, batches: list[Tensor]) -> None:
    assert evaluate(llama, batches[:1], kind="masked", **QUIET).delta is None
    with pytest.raises(OptionError, match=r"unknown kind 'seq2seq'; .*causal, masked"):
        evaluate(llama, batches, kind="seq2seq")


def test_padding_is_not_compared(llama: nn.Module, batches: list[Tensor]) -> None:
    tokens = batches[0]
    mask = torch.ones_like(tokens)
    mask[0, 20:] = 0
    padded = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    found = evaluate(llama, [padded], **QUIET)
    assert found.tokens == 2 * 23 + 19
    assert found.windows == 3
    p = logits(llama, [tokens])[:, :-1].log_softmax(-1)
    losses = -p.gather(-1, tokens[:, 1:, None])[..., 0]
    expected = (losses[0, :19].sum() + losses[1:].sum()) / found.tokens
    assert found.dense is not None
    assert found.dense.mean == pytest.approx(float(expected), rel=1e-5)


# ---- memory --------------------------------------------------------------------------------------


def test_logits_of_one_batch_are_held_at_a_time(
    llama: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[StorageWeakRef] = []
    alive = []

    def watched(*logits: Any) -> Sums:
        gc.collect()
        held.extend(StorageWeakRef(each.untyped_storage()) for each in logits[:2])
        alive.append(sum(not one.expired() for one in held))
        return compare(*logits)

    monkeypatch.setattr("amber_compile.evaluation.language_model.compare", watched)
    evaluate(llama, batches * 3, skip=["*"], **QUIET)
    assert len(held) == 2 * 6
    assert alive == [2] * 6


# ---- what is reported ----------------------------------------------------------------------------


def test_json_has_the_agreed_keys(evaluated: Evaluation) -> None:
    facts = evaluated.to_json()
    assert set(facts) == {"dense", "sparse", "coverage"}
    assert {"nll", "ppl"} <= set(facts["dense"])
    assert {"nll", "nll_se", "ppl", "kl", "top1"} <= set(facts["sparse"])
    assert {"macs"} <= set(facts["coverage"])
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["sparse"]["ppl"] == pytest.approx(2.718281828 ** facts["sparse"]["nll"])


def test_logits_that_are_no_numbers_are_told(own_llama: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        own_llama.lm_head.weight[7, 3] = float("nan")
    found = evaluate(own_llama, batches[:1], **QUIET)
    assert found.bad == (69, 69)
    facts = found.to_json()
    assert facts["sparse"]["nll"] == facts["sparse"]["kl"] == facts["sparse"]["nll_se"] == "nan"
    assert facts["dense"]["bad_tokens"] == 69
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert "69 tokens dense, 69 sparse" in str(found)


def test_people_get_a_table(evaluated: Evaluation) -> None:
    found = evaluated
    assert found.delta is not None
    lines = str(found).splitlines()
    assert lines[0] == "6 windows, 138 tokens compared; ± is a standard error"
    assert any(line.startswith("loss") and f"{found.delta.mean:.4f} ±" in line for line in lines)
    assert "3 of 8 projections sparse" in lines[-1]
    assert "NaN" not in str(found)


def test_a_bar_is_shown_on_stderr(
    llama: nn.Module, batches: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = evaluate(llama, [batches[0][:1]], skip=["*"]).to_json()
    printed = capsys.readouterr()
    assert "windows" in printed.err
    assert not printed.out
    assert facts["sparse"]["nll_se"] is facts["sparse"]["kl_se"] is None  # of one window


# ---- mistakes ------------------------------------------------------------------------------------


class Headless(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids.float()


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "holds no window of at least two tokens"),
        ([torch.ones(2, 1, dtype=torch.long)], {"kind": "causal"}, "of at least two tokens"),
        ([torch.ones(2, 0, dtype=torch.long)], {"kind": "causal"}, r"holds \[2, 0\]; valid"),
        ([torch.ones(8, dtype=torch.long)], {}, r"holds \[8\]; valid: whole numbers \[batch, tok"),
        ([torch.ones(2, 8)], {}, "valid: whole numbers"),
        ([{"tokens": torch.ones(2, 8)}], {}, "holds NoneType; valid"),
        ([torch.full((1, 8), VOCAB)], {}, "token 96, and the model knows 0 to 95: is the text"),
        ([torch.full((1, 8), -1)], {}, "holds the token -1"),
        ([torch.ones(1, 8, dtype=torch.long)], {"patern": "2:4"}, "did you mean 'pattern'"),
        ([torch.ones(1, 8, dtype=torch.long)], {"generate": -1}, "generate=-1 must be"),
    ],
)
def test_a_mistake_names_itself(
    llama: nn.Module, batches: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        evaluate(llama, batches, **QUIET, **options)


def test_a_model_without_logits(evaluated: Evaluation) -> None:
    with pytest.raises(AttributeError):
        evaluated.tokens = 0  # type: ignore[misc]  # it is a value
    with pytest.raises(OptionError, match=r"returns no logits .*evaluate_encoder"):
        evaluate(Headless(), [torch.ones(1, 8, dtype=torch.long)], **QUIET)
