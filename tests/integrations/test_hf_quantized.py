"""Weights that torchao quantised are left alone, with a reason; the others are sparsified."""

import copy
from typing import Any

import pytest
import torch
from emulate import Settings, sparsified
from hf_models import OPTIONS, new_llama, planned, sparse_names, tokens
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

from amber_compile import last_reports

CONFIGS = [
    (Int8WeightOnlyConfig(), "Int8Tensor"),
    (Int8DynamicActivationInt8WeightConfig(), "Int8Tensor"),
    (Float8WeightOnlyConfig(), "Float8Tensor"),
]
IDS = tokens(batch=2)


def quantized(config: Any, but: str | None = None) -> nn.Module:
    """Return a model whose linears are quantised, but for those whose name ends with ``but``."""
    model, _ = new_llama()

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not (but and name.endswith(but))

    quantize_(model, config, filter_fn=wanted)
    return model


@torch.no_grad()
def logits(model: nn.Module, backend: str = "amber_eager", **options: Any) -> Tensor:
    """Return what a compiled copy of ``model`` computes."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    model.compile(backend=backend, options=OPTIONS | options if backend != "eager" else None)
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("config", "kind"), CONFIGS, ids=[type(config).__name__ for config, _ in CONFIGS]
)
def test_quantised_weights_are_left_alone_with_a_reason(config: Any, kind: str) -> None:
    model = quantized(config)
    assert torch.equal(logits(model), logits(model, backend="eager"))
    sites = last_reports()[0].sites
    left = {site.name for site in sites if kind in str(site.decision.reason)}
    assert left == planned(model).keys()
    assert all(site.decision.obstacle for site in sites if site.name in left)
    assert sparse_names() == set()


def test_strict_refuses_them() -> None:
    model = quantized(Int8WeightOnlyConfig())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"RewriteError.*Int8Tensor"):
        logits(model, strict=True)


def test_they_are_not_quantised_again() -> None:
    model = quantized(Int8WeightOnlyConfig())
    assert torch.equal(logits(model, quantize="int8"), logits(model, backend="eager"))
    reasons = {site.decision.unquantized for site in last_reports()[0].sites}
    assert len(reasons) == 2  # the other one: heads stay in 16 bit
    assert any("Int8Tensor" in str(reason) for reason in reasons)


def test_the_plain_weights_of_a_partly_quantised_model_are_sparsified() -> None:
    model = quantized(Int8WeightOnlyConfig(), but="down_proj")
    names = {name for name in planned(model) if name.endswith("down_proj")}
    with sparsified(model, dict.fromkeys(names, Settings(2, 4))), torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert torch.equal(logits(model), expected)
    assert sparse_names() == names


def test_a_model_that_was_quantised_while_it_was_loaded(tmp_path: Any) -> None:
    new_llama()[0].save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    assert torch.equal(logits(model), logits(model, backend="eager"))
    assert any("Int8Tensor" in str(site.decision.reason) for site in last_reports()[0].sites)
