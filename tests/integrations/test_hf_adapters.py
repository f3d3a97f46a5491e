"""LoRA adapters (PEFT): attached, switched, switched off, merged, unmerged and unloaded.

PEFT merges by ``weight.data += delta``, which PyTorch does not count. All values here are multiples
of 1/1024 and small, so that a merge and the unmerge after it are exact.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulate import sparsified
from hf_models import OPTIONS, new_llama, phases, planned, reasons, sparse_names, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from amber_compile import explain, last_reports, refresh, restore

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = tokens(batch=2)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks transformers
)


@pytest.fixture(autouse=True)
def many_graphs() -> Iterator[None]:
    """Each state of the adapters is a graph: more than Dynamo's eight."""
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


@torch.no_grad()
def with_adapters(*names: str, **options: Any) -> Any:
    """Return a model with random adapters; the first is active."""
    model, _ = new_llama()
    options = {"target_modules": TARGETS} | options
    configs = [LoraConfig(r=4, lora_alpha=8, **options) for _ in names]
    lora = get_peft_model(model, configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        lora.add_adapter(name, config)
    for name, parameter in lora.named_parameters():
        noise = torch.randn_like(parameter) * 4 if "lora_" in name else parameter * 1024
        parameter.copy_(noise.round() / (32 if "lora_" in name else 1024))
    return lora.eval()


def compiled(lora: Any, **options: Any) -> Any:
    lora.get_base_model().compile(backend="amber_eager", options=OPTIONS | options)
    return lora


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def expected(lora: Any) -> Tensor:
    """Return what ``lora`` should compute, by the emulation, from its weights as they are now."""
    eager = copy.deepcopy(lora)
    base = eager.get_base_model() if hasattr(eager, "get_base_model") else eager
    base._compiled_call_impl = None
    with sparsified(base, planned(base)):
        return logits(eager)


# ---- attached ------------------------------------------------------------------------------------


def test_an_attached_adapter_is_dense_around_a_sparse_base_layer() -> None:
    lora = compiled(with_adapters("one"))
    assert torch.equal(logits(lora), expected(lora))
    bare, _ = new_llama()
    assert sparse_names() == planned(bare).keys()
    assert "rule: adapters are small and stay dense" in reasons()
    adapters = [site for site in last_reports()[0].sites if "lora_" in site.name]
    assert {site.role for site in adapters} == {"adapter"}
    assert len(adapters) == 2 * len(TARGETS)


def test_adapters_are_not_quantised() -> None:
    lora = compiled(with_adapters("one"), quantize="int8")
    logits(lora)
    sites = {site.name: site.decision for site in last_reports()[0].sites}
    kept = {name for name, decision in sites.items() if not decision.quantization}
    assert kept == {"lm_head"} | {name for name in sites if "lora_" in name}
    assert "rule: adapters stay in 16 bit" in {one.unquantized for one in sites.values()}


def test_generate_is_that_of_the_base_model() -> None:
    lora = with_adapters("one")
    lora.compile(backend="amber_eager")
    lora.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert last_reports() == []  # PEFT calls generate of the base model
    compiled(lora).generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert phases() == [("prefill", True), ("decode", False)]


def test_compiled_as_a_whole_the_names_are_those_of_the_wrapped_model() -> None:
    lora = with_adapters("one")
    lora.compile(backend="amber_eager")
    logits(lora)
    assert sparse_names() == {name.removesuffix(".base_layer") for name in planned(lora)}
    assert sparse_names([explain(lora, IDS)]) == sparse_names()


def test_dora_breaks_the_graph_and_is_dense_itself() -> None:
    lora = with_adapters("one", use_dora=True, target_modules=["down_proj"])
    base = lora.get_base_model()
    others = {name: how for name, how in planned(base).items() if "down_proj" not in name}
    with sparsified(base, others):
        result = logits(lora)
    assert torch.equal(logits(compiled(lora)), result)
    assert {name.rpartition(".")[2] for name in sparse_names()} == {"q_proj", "gate_proj"}
    assert any(one.breaks for one in last_reports())


# ---- switched ------------------------------------------------------------------------------------


def test_adapters_are_switched_and_switched_off() -> None:
    lora = compiled(with_adapters("one", "other"))
    results = []
    for name in ("one", "other", "one"):
        lora.set_adapter(name)
        results.append(logits(lora))
        assert torch.equal(results[-1], expected(lora))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    with lora.disable_adapter():
        assert torch.equal(logits(lora), expected(lora))
    assert phases() == [("prefill", True)] * 3


# ---- merged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}], ids=["sparse", "int8"])
def test_a_merge_is_noticed_by_the_graph_that_it_makes(options: dict[str, str]) -> None:
    lora = compiled(with_adapters("one"), **options)
    attached = logits(lora)
    lora.merge_adapter()
    merged = logits(lora)
    refresh(lora)
    assert torch.equal(logits(lora), merged)  # nothing was stale
    lora.unmerge_adapter()
    assert torch.equal(logits(lora), attached)
    assert phases() == [("prefill", True)] * 2


def test_merged_and_unloaded_models_are_sparsified_by_their_new_weights() -> None:
    lora = compiled(with_adapters("one"))
    logits(lora)
    lora.merge_adapter()
    assert torch.equal(logits(lora), expected(lora))
    lora.unmerge_adapter()
    model = lora.merge_and_unload()
    assert torch.equal(logits(model), expected(model))
    assert phases() == [("prefill", True)] * 3


def test_each_merged_adapter_has_a_graph_and_its_own_factors() -> None:
    lora = compiled(with_adapters("one", "other"))
    for name in ("one", "other", "one", "other"):
        lora.merge_adapter([name])
        assert torch.equal(logits(lora), expected(lora))
        lora.unmerge_adapter()
    assert phases() == [("prefill", True)] * 2


def test_an_adapter_switched_off_while_merged_is_unmerged_by_one_call() -> None:
    lora = compiled(with_adapters("one"))
    lora.merge_adapter()
    with lora.disable_adapter():
        logits(lora)  # PEFT unmerges inside forward
        assert "the graph writes to its weight" in reasons()
        assert torch.equal(logits(lora), expected(lora))


def test_a_merge_by_hand_needs_refresh() -> None:
    lora = compiled(with_adapters("one"))
    model = lora.unload()
    logits(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data += torch.randn_like(module.weight)  # as PEFT does
    assert not torch.equal(logits(model), expected(model))  # nothing tells that graph
    refresh(model)
    assert torch.equal(logits(model), expected(model))
    assert phases() == [("prefill", True)]


def test_a_safe_merge_is_always_noticed() -> None:
    lora = compiled(with_adapters("one", "other"))
    for name in ("one", "other"):  # each merge gives the weights new storage
        lora.merge_adapter([name], safe_merge=True)
        assert torch.equal(logits(lora), expected(lora))
        lora.unmerge_adapter()


def test_an_adapter_merged_into_released_weights_is_an_error() -> None:
    lora = compiled(with_adapters("one"), quantize="int8", decode="int8")
    logits(lora)
    lora.merge_adapter()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="were released") as raised:
        logits(lora)
    assert "ReleasedError" in str(raised.value)


def test_restored_weights_can_be_merged_into() -> None:
    lora = compiled(with_adapters("one"), quantize="int8", decode="int8")
    attached = logits(lora)
    with lora.disable_adapter():
        bare = logits(lora)
    restore(lora)
    lora.merge_adapter()
    merged = logits(lora)
    assert (merged - attached).norm() < (merged - bare).norm()
