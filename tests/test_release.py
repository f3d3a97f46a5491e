"""Weights whose values are released: what still runs, what is refused, and how they come back."""

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stack import Stack
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, StaticCache
from zoo import WIDE, Model

from amber_compile import explain, last_reports, refresh, stand_in
from amber_compile.debug.compare import check
from amber_compile.derivations import ScoreFactor
from amber_compile.derived import derive, kept
from amber_compile.errors import ReleasedError
from amber_compile.release import release, restore
from amber_compile.stand_in import is_released, released

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
PLAIN = {"quantize": "int8", "correction": None}
DECODE = PLAIN | {"decode": "int8"}


def compiled(model: nn.Module, **options: object) -> Callable[..., Any]:
    run = torch.compile(model, backend="amber_eager", options=DECODE | options)
    return torch.no_grad()(run)


def expected(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Return what a copy of ``model`` computes that keeps its weights."""
    kept = torch.compile(copy.deepcopy(model), backend="amber_eager", options=PLAIN)
    with torch.no_grad():
        result = kept(*inputs)
    torch._dynamo.reset()
    return result


# ---- what runs ----


def test_prefill_computes_what_it_did_and_decode_multiplies_by_the_same_codes():
    stack = Stack()
    wanted = expected(stack, X)
    run = compiled(stack)
    assert torch.equal(run(X), wanted)
    assert len(released(stack)) == 6
    (wide,) = (report for report in last_reports()[-1:])
    decoded = run(X[:, :1])
    assert last_reports()[-1].graphs[0].phase == "decode"
    assert decoded.isfinite().all()
    assert all(site.decision.quantization for site in last_reports()[-1].sites)
    assert wide.memory.released == wide.memory.before


def test_nothing_compiles_again_and_every_length_may_come():
    run = compiled(Stack())
    first = run(X)
    assert torch.equal(run(X), first)
    assert len(last_reports()) == 1
    more = run(X.repeat(1, 2, 1))
    assert torch.equal(more[:, :8], first)
    assert len(last_reports()) == 2


def test_whatever_comes_first():
    stack, twin = Stack(), Stack()
    wanted = expected(stack, X)
    run = compiled(stack)
    run(X[:, :1])  # decode alone knows no score
    assert torch.equal(run(X), wanted)
    assert torch.equal(compiled(twin)(X[:, :1]), run(X[:, :1]))


def test_a_short_prompt_first_where_it_stays_dense():
    stack = Stack()
    wanted = expected(stack, X)
    run = compiled(stack, min_tokens=4)
    run(X[:1, :2])
    assert torch.equal(run(X), wanted)


def test_a_gate_whose_half_is_sparse_in_prefill_is_whole_in_decode():
    model, inputs = Model("phi3", {**WIDE, "head_dim": 16}).build()
    run = compiled(model)
    run(**inputs)
    assert any(name.endswith("gate_up_proj.weight") for name in released(model))
    one = {name: value[:, :1] for name, value in inputs.items()}
    decoded = run(**one).logits
    torch._dynamo.reset()
    fresh, _ = Model("phi3", {**WIDE, "head_dim": 16}).build()
    assert torch.equal(compiled(fresh)(**one).logits, decoded)


def test_compiled_anew_after_a_reset():
    stack = Stack()
    run = compiled(stack)
    first = run(X), run(X[:, :1])
    del run
    torch._dynamo.reset()
    gc.collect()
    run = compiled(stack)
    assert torch.equal(run(X), first[0])
    assert torch.equal(run(X[:, :1]), first[1])


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_generate(cache):
    model, inputs = Model("llama", WIDE | {"num_hidden_layers": 1}).build()
    wanted = _generate(copy.deepcopy(model), inputs, cache, {})
    torch._dynamo.reset()
    found = _generate(model, inputs, cache, {"decode": "int8"})
    assert len(released(model)) == 7
    assert torch.equal(found[0], wanted[0])  # prefill is the same
    assert all(step.isfinite().all() for step in found)
    assert all(torch.allclose(a, b, atol=0.3) for a, b in zip(found, wanted, strict=True))


def _generate(model, inputs, cache, options):
    options = PLAIN | {"projections": ()} | options
    model.compile(backend="amber_eager", options=options, dynamic=False)
    implementation = "static" if cache is StaticCache else "dynamic"
    output = model.generate(
        **inputs,
        cache_implementation=implementation,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits


def test_threads():
    stack = Stack()
    wanted = expected(stack, X)
    run, found = compiled(stack), []
    run(X[:, :1])

    def call() -> None:
        for _ in range(5):
            found.append(torch.equal(run(X), wanted))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


def test_layers_compiled_one_by_one():
    stack = Stack()
    wanted = expected(stack, X)
    for layer in stack.layers:
        layer.compile(backend="amber_eager", options=DECODE)
    with torch.no_grad():
        assert torch.equal(stack(X), wanted)
        assert torch.equal(stack(X), wanted)
    assert len(released(stack)) == 6


# ---- what is kept ----


def test_tied_weights_keep_their_values():
    model, inputs = Model("llama", WIDE | {"tie_word_embeddings": True}).build()
    compiled(model)(**inputs)
    assert "model.embed_tokens.weight" not in released(model)
    assert len(released(model)) == 14


def test_skipped_projections_keep_their_values():
    stack = Stack()
    compiled(stack, quantize_skip="*.down_proj")(X)
    assert sorted(released(stack)) == sorted(
        f"layers.{layer}.{name}_proj.weight" for layer in (0, 1) for name in ("gate", "up")
    )


class Twice(nn.Module):
    """One weight in a projection, and once more in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up_proj(x)
        torch._dynamo.graph_break()
        return y * self.up_proj.weight.sum()


def test_a_weight_that_another_graph_reads_is_refused_there():
    run = compiled(Twice())
    with pytest.raises(ReleasedError, match=r"weight \[64, 64\] were released.*quantize_skip="):
        run(X)


def test_a_weight_that_an_earlier_graph_read_is_kept():
    model = Twice()

    def other(x: Tensor) -> Tensor:
        return x @ model.up_proj.weight * model.up_proj.weight.sum()

    run = torch.no_grad()(torch.compile(other, backend="amber_eager", options=DECODE))
    first = run(X)
    compiled(model.up_proj)(X)
    assert released(model) == []
    (site,) = last_reports()[-1].sites
    assert (site.released, site.code_bytes > 0) == (False, True)
    assert torch.equal(run(X), first)


def test_without_decode_nothing_is_released():
    stack = Stack()
    with torch.no_grad():
        torch.compile(stack, backend="amber_eager", options=PLAIN)(X)
    assert released(stack) == []
    assert last_reports()[-1].memory.released == 0


def test_explain_and_check_release_nothing():
    stack = Stack()
    report = explain(stack, X, device="cpu", **DECODE)
    assert report.memory.released == report.memory.before
    assert "estimated" in str(report)
    check(stack, X, **DECODE)
    assert released(stack) == []


# ---- what is refused ----


def reason(call: Callable[[], object]) -> str:
    with pytest.raises((ReleasedError, BackendCompilerFailed)) as caught:
        call()
    return str(caught.value)


def test_other_options_are_refused():
    stack = Stack()
    compiled(stack)(X)
    assert "its codes do not tell" in reason(
        lambda: compiled(stack, quantize="fp8", decode="fp8")(X)
    )
    assert "this graph reads them" in reason(
        lambda: torch.no_grad()(torch.compile(stack, backend="amber_eager"))(X)
    )


def test_gradients_are_refused():
    stack = Stack()
    compiled(stack)(X)
    run = torch.compile(stack, backend="amber_eager", options=DECODE)
    with pytest.warns(UserWarning, match="needs gradients"):
        assert "this graph reads them" in reason(lambda: run(X))


def test_the_dense_fallback_is_refused():
    stack = Stack()
    run = compiled(stack)
    run(X)
    layer = stack.layers[1].down_proj
    layer.weight.data = torch.full_like(layer.weight, torch.inf)
    assert "this graph reads them" in reason(lambda: run(X))


def test_whoever_reads_the_values_all_the_same_gets_nan():
    stack = Stack()
    compiled(stack)(X)
    with torch.no_grad():
        assert stack(X).isnan().all()
        assert copy.deepcopy(stack)(X).isnan().all()
    file = io.BytesIO()
    torch.save(stack.state_dict(), file)
    file.seek(0)
    assert all(value.isnan().all() for value in torch.load(file).values())
    with pytest.raises(ReleasedError, match="check runs the model as it is"):
        check(stack, X)


def test_a_model_with_released_weights_is_not_saved(tmp_path):
    model, inputs = Model("llama", WIDE | {"num_hidden_layers": 1}).build()
    compiled(model)(**inputs)
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path)
    restore(model)
    model.save_pretrained(tmp_path)


def test_loading_into_released_weights_is_found():
    stack, other = Stack(), Stack(seed=1)
    run = compiled(stack)
    run(X)
    stack.load_state_dict(other.state_dict())
    assert "since it was written to" in reason(lambda: run(X))
    restore(stack)
    stack.load_state_dict(other.state_dict())
    assert torch.equal(run(X), expected(other, X))


# ---- and back ----


def test_restored_weights_are_codes_times_scales():
    stack = Stack()
    before = [weight.detach().clone() for weight in stack.parameters()]
    run = compiled(stack)
    first = run(X)
    assert restore(stack) == 6
    assert released(stack) == []
    for weight, old in zip(stack.parameters(), before, strict=True):
        step = old.abs().amax(1, keepdim=True) / 127
        assert ((weight - old).abs() <= step * (0.5 + 2**-16)).all()
        assert not torch.equal(weight, old)
    assert torch.equal(run(X), first)
    assert len(released(stack)) == 6
    assert restore(stack) == 6
    assert restore(stack) == 0


def test_new_values_are_released_as_well():
    stack, other = Stack(), Stack(seed=1)
    run = compiled(stack)
    run(X)
    stack.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(run(X), expected(Stack(seed=1), X))
    for weight in stack.parameters():
        weight.data = torch.randn(weight.shape)
    run(X)
    assert len(released(stack)) == 6


def test_refresh_forgets_no_released_weight():
    stack = Stack()
    run = compiled(stack)
    first = run(X)
    refresh(stack)
    assert torch.equal(run(X), first)


def test_restore_takes_a_module():
    with pytest.raises(TypeError, match=r"restore takes a torch\.nn\.Module, not Tensor"):
        restore(X)


# ---- memory ----


def test_stand_ins_share_one_buffer_and_codes_die_with_their_weight(monkeypatch):
    monkeypatch.setattr(stand_in, "_buffers", weakref.WeakValueDictionary())
    stack = Stack()
    run = compiled(stack)
    run(X)
    weights = list(stack.parameters())
    assert len({weight.data_ptr() for weight in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == max(weight.nbytes for weight in weights)
    ends = weakref.ref(weights[0]), weakref.ref(stand_in._released[weights[0]])
    codes = [weakref.ref(codes) for codes in kept(weights[0]).values()]
    assert len(codes) == 3  # and scale, and factor
    del run, stack, weights
    torch._dynamo.reset()
    gc.collect()
    assert [end() for end in (*ends, *codes)] == [None] * 5


def test_a_view_of_a_released_weight_keeps_its_values():
    layer = nn.Linear(64, 64, bias=False)
    view, before = layer.weight.detach()[:8], layer.weight.detach().clone()
    compiled(layer)(X)
    assert is_released(layer.weight)
    assert torch.equal(view, before[:8])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_weights_made_in_inference_mode(mode):
    with torch.inference_mode():
        stack = Stack()
    run = torch.compile(stack, backend="amber_eager", options=DECODE)
    with mode():
        first = run(X)
        assert torch.equal(run(X), first)
    assert len(released(stack)) == 6
    assert restore(stack) == 6


def test_a_factor_that_was_not_asked_for_is_refused():
    weight = torch.randn(32, 64)
    assert release(weight) is None
    with pytest.raises(ReleasedError, match="score"):
        derive(weight, ScoreFactor("weight_norm"))


def test_the_report_tells_memory():
    stack = Stack()
    compiled(stack)(X)
    report = last_reports()[-1]
    memory = report.memory
    assert memory.before == sum(weight.nbytes for weight in stack.parameters())
    assert memory.after == memory.codes < memory.before / 3
    assert f"{memory.before // 1000} kB before" in str(report)
    assert report.to_json()["memory"]["released"] == memory.before


def test_generated_code_reads_no_released_weight(inductor):
    layer = nn.Linear(64, 64)
    options = DECODE | {"projections": ()}
    run = torch.no_grad()(torch.compile(layer, backend="amber", options=options, dynamic=False))
    first = run(X)
    assert len(released(layer)) == 1
    assert torch.equal(run(X), first)
    assert run(X[:, :1]).isfinite().all()
    assert len(last_reports()) == 2
