"""Models whose modules carry hooks or checkpoints: ``device_map``, accelerate, training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from emulate import sparsified
from hf_models import OPTIONS, new_llama, phases, planned, reasons, sparse_names, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from amber_compile import Report, last_reports, register_model

IDS = tokens(batch=2)
OUTSIDE = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
NESTED = "it lies inside a nested graph (a checkpoint, a condition or a compiled region)"
GRADIENTS = "the graph needs gradients: call the model under torch.no_grad()"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def pruned(model: nn.Module) -> Tensor:
    """Return the logits of the emulation."""
    with sparsified(model, planned(model)):
        return logits(model)


def loaded(folder: Path, **options: Any) -> nn.Module:
    new_llama()[0].save_pretrained(folder)
    options |= {"attn_implementation": "eager", "dtype": torch.float32}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


# ---- device_map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_of_one_device(tmp_path: Path, device_map: str) -> None:
    model = loaded(tmp_path, device_map=device_map)
    expected = pruned(model)
    model.compile(backend="amber_eager", options=OPTIONS)
    assert torch.equal(logits(model), expected)
    assert phases() == [("prefill", True)]


def dispatched(layers: int) -> nn.Module:
    """Return a model with hooks on every module, as where its layers lie on several GPUs."""
    parts = [*OUTSIDE, *(f"model.layers.{layer}" for layer in range(layers))]
    everywhere = dict.fromkeys(parts, "cpu")
    return dispatch_model(new_llama(layers)[0], everywhere, main_device="cpu", force_hooks=True)


def test_layers_without_inner_hooks_are_compiled_one_by_one() -> None:
    expected = pruned(new_llama(layers=2)[0])
    model = dispatched(layers=2)
    register_model(model)
    for layer in model.model.layers:
        remove_hook_from_submodules(layer)
        layer.compile(backend="amber_eager", options=OPTIONS)
    assert torch.equal(logits(model), expected)
    report = Report.merge(last_reports())
    assert {site.name for site in report.sites if site.decision.sparse} == planned(model).keys()
    assert len(report.sites) == 2 * 7


def test_a_hook_at_every_linear_breaks_the_graph_there() -> None:
    model = dispatched(layers=1)
    dense = logits(model)
    model.compile(backend="amber_eager", options=OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=32):
        assert torch.equal(logits(model), dense)
    assert sparse_names() == set()
    assert all(one.breaks for one in last_reports()[:1])
    assert reasons() == {"rule: the name says no role; list it in projections= to sparsify it"}


def test_offloaded_weights_stay_dense(tmp_path: Path) -> None:
    parts = dict.fromkeys(OUTSIDE, "cpu") | {"model.layers.0": "disk"}
    model = loaded(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "weights")
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    dense = logits(model)
    model.compile(backend="amber_eager", options=OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=32):
        assert torch.equal(logits(model), dense)
    assert sparse_names() == set()
    assert reasons() == {"rule: the name says no role; list it in projections= to sparsify it"}


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpointed(train: bool) -> nn.Module:
    model, _ = new_llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(train)


def test_checkpoints_do_nothing_in_eval_mode() -> None:
    model = checkpointed(train=False)
    expected = pruned(model)
    model.compile(backend="amber_eager", options=OPTIONS)
    assert torch.equal(logits(model), expected)
    assert phases() == [("prefill", True)]


@pytest.mark.filterwarnings("ignore:amber. the graph needs gradients")  # said on purpose
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks
@pytest.mark.parametrize(("train", "reason"), [(False, GRADIENTS), (True, NESTED)])
def test_training_stays_dense_and_has_gradients(train: bool, reason: str) -> None:
    model = checkpointed(train)
    weight = model.model.layers[0].mlp.down_proj.weight
    results = []
    for backend in ("eager", "amber_eager"):
        model.compile(backend=backend)
        loss = model(input_ids=IDS, labels=IDS).loss
        results.append((loss, *torch.autograd.grad(loss, weight)))
    assert all(map(torch.equal, *results))
    assert sparse_names() == set()
    assert reason in reasons()


@torch.no_grad()
def test_checkpoints_in_train_mode_are_nested_graphs() -> None:
    model = checkpointed(train=True)
    dense = logits(model)
    model.compile(backend="amber_eager", options=OPTIONS)
    assert torch.equal(logits(model), dense)
    assert NESTED in reasons()
