"""The checks of every variant, and that what is wrong is found out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_correctness import correctness
from gpu_exact import Block, check, places
from gpu_variants import variants

CPU = torch.device("cpu")


def test_places_are_whole_runs_at_both_ends_and_between():
    assert places(5, 16).tolist() == [0, 1, 2, 3, 4]
    assert places(77, 16).tolist() == [*range(16), *range(32, 48), *range(64, 77)]


@pytest.mark.parametrize("variant", variants(CPU), ids=lambda variant: variant.name)
def test_every_variant_is_right_and_a_wrong_one_is_found_out(inputs, variant):
    block = Block.of(inputs)
    error, wrong = check(variant, inputs, block)
    assert not wrong
    assert error <= 1
    y = variant.run(inputs)

    def assert_found(spoilt: torch.Tensor) -> None:
        assert check(dataclasses.replace(variant, run=lambda _: spoilt), inputs, block)[1]

    other = torch.roll(y, 1, dims=1)
    assert_found(other)
    if y.is_floating_point():
        missing = y.clone()
        missing[40, 100] = float("nan")  # an element outside of the block
        assert_found(missing)


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_a_wrong_compression_is_found_out(inputs, kind):
    block = Block.of(inputs)
    values, metadata, scale = inputs.compress(kind)
    assert block.compression_differs(kind, (values, metadata, scale)) == ""
    metadata = metadata.clone()
    metadata[-1, 0, 0] ^= 0xC
    values = values.clone()
    values.view(torch.uint8)[76, 0] ^= 1
    assert block.compression_differs(kind, (values, metadata, scale)) == "values, metadata"


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "fp8"])
def test_the_correctness_part(kind, monkeypatch):
    monkeypatch.setattr("gpu_correctness.SIZES", ((1, 8, 64), (33, 24, 192)))
    rows = list(correctness(CPU, kind))
    assert len(rows) >= 1 + 2 * 3
    assert not [row for row in rows if row["wrong"]]
    assert "no CUDA device" in str(rows[0]["offered"])
