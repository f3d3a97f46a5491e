"""Inductor's pass on whole models: it decides as the backend does, and the model says the same."""

import pytest
import torch
from behind_aot import rewritten
from zoo import ZOO

from amber_compile import Report, last_reports
from amber_compile.report import clear_reports

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"  # transformers' MoE
)

QUICK = ("llama_tied", "phi3", "gpt2_bf16", "mixtral")
TWINS = {
    *("llama", "llama_bf16", "mistral", "qwen2", "gpt2", "gpt_oss"),
    *("mixtral_eager", "mixtral_batched", "phi3_bf16"),
}
"""Models so like another one here that they would cost more time than they tell."""


def decided(model, inputs, compiled):
    """Return what a compiled model answers, and what was decided of each of its projections."""
    clear_reports()
    torch._dynamo.reset()
    with torch.no_grad():
        logits = compiled(**inputs).logits
    sites = Report.merge(last_reports()).sites
    return logits, {one.name: (one.shape, one.share, str(one.decision)) for one in sites}


def assert_decides_as_the_backend(name, **options):
    model, inputs = ZOO[name].build()
    backend = torch.compile(model, backend="amber_eager", options=options)
    logits, sites = decided(model, inputs, backend)
    own_logits, own = decided(model, inputs, rewritten(model, **options))
    assert own == sites
    assert torch.equal(own_logits, logits)
    return own


@pytest.mark.parametrize("name", QUICK)
def test_decisions_and_logits_are_the_backends(name):
    sites = assert_decides_as_the_backend(name)
    assert any("2:4" in decision for _, _, decision in sites.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO.keys() - {*QUICK, *TWINS}))
def test_decisions_and_logits_are_the_backends_elsewhere(name):
    assert_decides_as_the_backend(name)


@pytest.mark.parametrize("name", ["phi3"])
def test_quantised_models_too(name):
    sites = assert_decides_as_the_backend(name, quantize="int8")
    assert any("int8" in decision for _, _, decision in sites.values())


def test_experts_may_be_named():
    wanted = ["*.experts.down_proj"]
    sites = assert_decides_as_the_backend("mixtral", projections=wanted)
    sparse = [name for name, (_, share, _) in sites.items() if share]
    assert sparse == [f"model.layers.{at}.mlp.experts.down_proj" for at in (0, 1)]


# ---- generation ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("cache", "quantize"),
    [("static", None), pytest.param("dynamic", "int8", marks=pytest.mark.slow)],
)
def test_generated_tokens_are_the_backends(cache, quantize):
    model, inputs = ZOO["llama"].build()
    dense = model.forward
    written = []
    for compiled in (
        torch.compile(dense, backend="amber_eager", options={"quantize": quantize}),
        rewritten(dense, quantize=quantize),
    ):
        torch._dynamo.reset()
        clear_reports()
        model.forward = compiled
        tokens = model.generate(
            inputs["input_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=4,
            do_sample=False,
            cache_implementation=cache,
        )
        phases = [graph.phase for report in last_reports() for graph in report.graphs]
        rewrites = [graph.rewritten for report in last_reports() for graph in report.graphs]
        assert phases[0] == "prefill"
        assert set(phases[1:]) == {"decode"}
        assert rewrites[0] > 0
        assert not any(rewrites[1:])
        written.append(tokens)
    assert torch.equal(*written)
    del model.forward
