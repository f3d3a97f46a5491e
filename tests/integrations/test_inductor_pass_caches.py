"""PyTorch's caches with Inductor's pass: found again by whom they fit, and by nobody else."""

import json
from uuid import uuid4

import pytest
import torch
from processes import HIT, MISS, hits, run_script
from stack import Stack, sparse
from test_calibrated import expected, plan_of
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import linear

from amber_compile import AmberConfig, last_reports
from amber_compile.integrations.inductor import AmberPass, inductor_options
from amber_compile.kernels import nm_select
from amber_compile.scores import weight_norm

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
PRE = "post_grad_custom_pre_pass"
SCRIPT = """
from test_inductor_pass_caches import compiled, told

print(json.dumps([told(json.loads(options)) for options in sys.argv[1:]]))
"""


class Two(nn.Module):
    """Two layers under the names ``first`` and ``second``, in that order."""

    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        self.names = first, second
        for name in self.names:
            self.add_module(name, nn.Linear(64, 64, bias=False))

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


@torch.no_grad()
def two(model, *sparse):
    """Return what ``model`` computes if the layers of these names read selections."""
    x = X
    for name in model.names:
        weight = getattr(model, name).weight
        x = linear(nm_select(x, weight_norm(weight), 2, 4) if name in sparse else x, weight)
    return x


@torch.no_grad()
def compiled(model, options):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, options=options)(X)


def told(options):
    """Compile with the pass; return the answer, what the caches did and what was reported."""
    before = len(last_reports())
    amber = AmberPass(AmberConfig(**options))
    answer = compiled(Stack(), {PRE: amber})
    return {
        "answer": answer.tolist(),
        "hits": hits(),
        "reports": len(last_reports()) - before,
        "uuid": amber.uuid(),
    }


@pytest.fixture
def empty_cache(inductor, monkeypatch):
    """Be a version of Amber that no cache knows: an empty folder would build headers anew."""
    version = uuid4().hex
    monkeypatch.setattr("amber_compile.integrations.inductor.source_hash", lambda: version)


# ---- a second process ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_process_finds_the_graphs_of_its_options_and_plans_only(tmp_path):
    stack = Stack()
    plan = plan_of(stack)
    plain, another = '{"correction": null}', '{"correction": null, "skip": "*.gate_proj"}'
    planned = json.dumps({"plan": str(tmp_path / "plan.json")})
    plan.save(tmp_path / "plan.json")
    cache = tmp_path / "cache"
    first = run_script(SCRIPT, plain, planned, cache=cache)
    second = run_script(SCRIPT, plain, planned, another, cache=cache)
    plan_of(stack).save(tmp_path / "plan.json")  # other tensors
    third = run_script(SCRIPT, planned, cache=cache)[0]
    for one, again in zip(first, second, strict=False):
        assert one["hits"].items() >= MISS.items()
        assert again["hits"].items() >= HIT.items()
        assert (one["reports"], again["reports"]) == (1, 0)
        assert one["answer"] == again["answer"]
        assert one["uuid"] == again["uuid"]
    assert first[0]["answer"] == sparse(stack, X).tolist()
    assert first[1]["answer"] == expected(stack, X, plan).tolist()
    gates = ["layers.0.gate_proj", "layers.1.gate_proj"]
    assert second[2]["hits"].items() >= MISS.items()
    assert second[2]["answer"] == sparse(stack, X, gates).tolist()
    assert third["hits"].items() >= MISS.items()


# ---- the same in one process ---------------------------------------------------------------------


def test_names_of_modules_are_part_of_the_key(empty_cache, monkeypatch):
    options = {PRE: AmberPass(AmberConfig(projections=["a"], correction=None))}
    models = Two("a", "b"), Two("b", "a"), Two("c", "d")
    expected = [two(model, "a") for model in models]
    with monkeypatch.context() as patch:  # without the names
        patch.setattr("amber_compile.integrations.inductor.traced_names", list)
        assert torch.equal(compiled(models[0], options), expected[0])
        for model, wanted in zip(models[1:], expected[1:], strict=True):
            answer = compiled(model, options)
            assert hits()["fxgraph_cache_hit"] == 1
            assert torch.equal(answer, two(model, model.names[0]))  # of the model before
            assert not torch.equal(answer, wanted)
    for model, wanted in zip(models, expected, strict=True):
        assert torch.equal(compiled(model, options), wanted)
        assert hits().items() >= MISS.items()
    for model, wanted in zip(models, expected, strict=True):
        assert torch.equal(compiled(model, options), wanted)
        assert hits().items() >= HIT.items()


def test_a_warm_cache_reads_the_weights_and_the_plan_of_the_call(empty_cache):
    for seed in (0, 1):
        model = Stack(seed)
        options = inductor_options(AmberConfig(correction=None))
        assert torch.equal(compiled(model, options), sparse(model, X))
    assert hits().items() >= HIT.items()
    plan = plan_of(model)
    answer = compiled(model, inductor_options(AmberConfig(plan=plan)))
    assert torch.equal(answer, expected(model, X, plan))
    assert hits().items() >= MISS.items()


def test_a_plain_function_in_the_chain_keeps_the_caches_off(empty_cache):
    ran = []
    with torch._inductor.config.patch({PRE: ran.append}):
        options = inductor_options(AmberConfig(correction=None))
    for times in (1, 2):
        assert torch.equal(compiled(Stack(), options), sparse(Stack(), X))
        assert len(ran) == times
        assert not hits()["fxgraph_cache_hit"]


def test_a_list_of_passes_is_cached_where_pytorch_takes_one(empty_cache):
    if not hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"):
        pytest.skip("PyTorch 2.11 takes one pass for a hook")
    options = {PRE: [AmberPass(AmberConfig(correction=None))]}
    for expected_hits in (MISS, HIT):
        assert torch.equal(compiled(Stack(), options), sparse(Stack(), X))
        assert hits().items() >= expected_hits.items()


@torch.no_grad()
def test_layers_with_passes_of_their_own_share_a_graph(empty_cache):
    model = Stack()
    wanted = sparse(model, X)
    counters.clear()
    for layer in model.layers:
        layer.compile(options=inductor_options(AmberConfig(correction=None)))
    assert torch.equal(model(X), wanted)
    assert counters["stats"]["unique_graphs"] == 1
