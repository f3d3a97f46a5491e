"""The pass in vLLM's pass manager: of the vLLM that is installed, and of a double of it."""

import importlib
import json
import pickle
import sys
import warnings

import pytest
import torch
from torch.nn.functional import linear
from vllm_double import Manager, Mlp, Range, compile_ranges, tokens

from amber_compile import AmberConfig, Plan, last_reports
from amber_compile.errors import OptionError
from amber_compile.integrations.amber_vllm import pass_of
from amber_compile.integrations.vllm import MIN_TOKENS, AmberVllmPass, compilation_config
from amber_compile.kernels.nm_select import nm_select_reference
from amber_compile.scores import SCORES, weight_norm

HOOK = "post_grad_custom_post_pass"
SMALL, LARGE = Range(1, 15), Range(16, 64)


@pytest.fixture(params=["double", "vllm"])
def manager(request, inductor):
    """Return the class of the pass manager."""
    if request.param == "double":
        return Manager
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what vLLM imports uses what others deprecate
        pytest.importorskip("vllm")
        return importlib.import_module("vllm_package").Manager


def amber(**options):
    return AmberVllmPass(AmberConfig(**{"min_tokens": 16, "correction": None} | options))


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def selected(x, weight):
    return nm_select_reference(x, weight_norm(weight), 2, 4)


@torch.no_grad()
def sparse(model, x):
    """Return what ``model`` answers when the gate's half and down_proj read selections."""
    gate, up = model.mlp.gate_up_proj.weight.chunk(2)
    middle = torch.relu(linear(selected(x, gate), gate)) * linear(x, up)
    down = model.mlp.down_proj.weight
    return model.norm(x, linear(selected(middle, down), down))


# ---- graphs --------------------------------------------------------------------------------------


@torch.no_grad()
def test_large_ranges_are_rewritten_and_small_ones_are_not(manager):
    model, passes = Mlp(), manager(amber())
    run = compile_ranges(model, [SMALL.end, LARGE.end], passes)
    few, many = tokens(15), tokens(16)
    assert torch.equal(run(few), model(few))
    assert torch.equal(run(many), sparse(model, many))
    assert not torch.equal(run(many), model(many))
    assert not any("amber" in target for target in targets(passes.graphs[SMALL]))
    assert targets(passes.graphs[LARGE]).count("amber.nm_select.default") == 2
    gate_up, down = last_reports()[-1].sites
    assert (gate_up.name, gate_up.share) == ("mlp.gate_up_proj", 0.5)
    assert (down.name, down.share) == ("mlp.down_proj", 1)  # not of the norm that adds to it


@torch.no_grad()
def test_rows_of_a_large_batch_are_sparse_whosever_they_are(manager):
    model = Mlp()
    run = compile_ranges(model, [SMALL.end, LARGE.end], manager(amber()))
    decode, prompt = tokens(2), tokens(20)
    alone, mixed = run(decode), run(torch.cat([prompt, decode]))
    assert torch.equal(alone, model(decode))
    assert torch.equal(mixed[20:], sparse(model, decode))
    assert not torch.equal(mixed[20:], alone)


@torch.no_grad()
def test_weights_that_change_are_scored_anew(manager):
    model, other, x = Mlp(), Mlp(seed=1), tokens(16)
    run = compile_ranges(model, [SMALL.end, LARGE.end], manager(amber()))
    assert torch.equal(run(x), sparse(model, x))
    model.mlp.down_proj.weight.copy_(other.mlp.down_proj.weight)
    assert torch.equal(run(x), sparse(model, x))
    model.mlp.down_proj.weight = Mlp(seed=2).mlp.down_proj.weight
    assert torch.equal(run(x), sparse(model, x))


@torch.no_grad()
def test_a_range_that_begins_too_low_stays_dense(manager):
    model, x, passes = Mlp(), tokens(20), manager(amber())
    run = compile_ranges(model, [LARGE.end], passes)
    with pytest.warns(UserWarning, match=r"1 to 64 tokens .*min_tokens=16.*endpoints=\[15\]"):
        assert torch.equal(run(x), model(x))
    assert not any("amber" in target for target in targets(passes.graphs[Range(1, 64)]))


@torch.no_grad()
def test_a_graph_is_rewritten_once(manager):
    model, x, passes = Mlp(), tokens(16), manager(amber(), amber())
    run = compile_ranges(model, [SMALL.end, LARGE.end], passes)
    assert torch.equal(run(x), sparse(model, x))
    assert targets(passes.graphs[LARGE]).count("amber.nm_select.default") == 2


@torch.no_grad()
def test_a_sparse_unit_takes_a_product_and_not_its_residual(manager, monkeypatch):
    fuse = sys.modules["amber_compile.passes.fuse_projections"]
    monkeypatch.setattr(fuse, "why_masked", lambda *_: None)
    monkeypatch.setattr("amber_compile.analysis.kernel_of", lambda *_: "nm_linear, pretended")
    model, x, passes = Mlp(), tokens(16), manager(amber(skip=["a key of its own in the caches"]))
    run = compile_ranges(model, [SMALL.end, LARGE.end], passes)
    assert torch.equal(run(x), sparse(model, x))
    found = targets(passes.graphs[LARGE])
    fused = [at for at, name in enumerate(found) if name == "amber.nm_linear.default"]
    assert len(fused) == 2  # the gate's half, and down_proj
    assert found[fused[1] + 1] == "aten.add.Tensor"
    assert found.count("aten.mm.default") == 1  # the up half
    assert "aten.addmm.default" in targets(passes.graphs[SMALL])
    assert "aten.addmm.default" not in found


def test_the_managers_uuid_knows_the_range_and_the_options(manager):
    def uuid(compile_range, **options):
        one = manager(amber(**options))
        with one.compiling(compile_range):
            return one.uuid()

    assert uuid(SMALL) == uuid(SMALL)
    assert len({uuid(SMALL), uuid(LARGE), uuid(LARGE, score="magnitude")}) == 3


# ---- the pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "applies"),
    [(1, 15, False), (2, 2, False), (15, 15, False), (16, 16, True), (17, 2**31 - 1, True)],
)
def test_ranges(start, end, applies):
    assert amber().is_applicable_for_range(Range(start, end)) is applies


@pytest.mark.parametrize("options", [{}, {"score": "magnitude"}, {"min_tokens": 17}])
def test_uuid_follows_the_options(options):
    assert (amber(**options).uuid() == amber().uuid()) is (not options)


def test_a_pass_goes_to_other_processes():
    one = amber(skip=["*.o_proj"])
    other = pickle.loads(pickle.dumps(one))
    assert (other.config, other.uuid()) == (one.config, one.uuid())


def test_decode_batches_stay_dense_unless_min_tokens_says_otherwise():
    assert AmberVllmPass().config.min_tokens == MIN_TOKENS
    assert AmberVllmPass(AmberConfig(pattern="4:8")).config.min_tokens == MIN_TOKENS
    assert AmberVllmPass(AmberConfig(min_tokens=3)).config.min_tokens == 3


def test_compilation_config_parts_the_ranges_where_the_pass_begins():
    found = compilation_config(AmberConfig(min_tokens=300))
    one = found["inductor_compile_config"][HOOK]
    (end,) = found["compile_ranges_endpoints"]
    assert not one.is_applicable_for_range(Range(1, end))
    assert one.is_applicable_for_range(Range(end + 1, 8192))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": Plan({})}, "plan= decides by layer"),
        ({"skip": ["layers.0.*"]}, r"skip='layers.0.\*' tells layers apart"),
        ({"projections": ["*.[0-3].*.down_proj"]}, "projections=.*tells layers apart"),
        ({"skip": ["*.1?.mlp.*"]}, "tells layers apart"),
        ({"mode": "max-autotune"}, "mode='max-autotune'"),
        ({"check": True}, "check=True"),
        ({"min_tokens": 2}, "min_tokens=2, .*valid: 3 or more"),
    ],
)
def test_options_without_a_place_in_vllm_are_errors(options, message):
    with pytest.raises(OptionError, match=message):
        AmberVllmPass(AmberConfig(**options))


@pytest.mark.parametrize("pattern", ["*.w1", "*.c_fc1", "*.layers.*.q_proj", "*.dense_4h_to_h"])
def test_patterns_that_hold_for_every_layer(pattern):
    assert AmberVllmPass(AmberConfig(projections=[pattern])).config.projections == (pattern,)


# ---- by name -------------------------------------------------------------------------------------


def test_the_name_that_vllm_looks_up(monkeypatch):
    monkeypatch.setenv("AMBER_VLLM", json.dumps({"min_tokens": 64}))
    monkeypatch.delitem(sys.modules, "amber_vllm", raising=False)
    found = __import__("amber_vllm").__dict__["prefill"]  # vLLM does it so
    assert isinstance(found, AmberVllmPass)
    assert found.config.min_tokens == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_tokens=64", "AMBER_VLLM='min_tokens=64' is no JSON"),
        ("[64]", "valid: a JSON object"),
        ('{"min_token": 64}', "did you mean 'min_tokens'"),
    ],
)
def test_options_by_name_that_are_wrong(text, message):
    with pytest.raises(OptionError, match=message):
        pass_of(text)


# ---- tensor parallelism --------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "weight_norm"])
def test_shards_of_a_row_parallel_projection_select_as_the_whole_does(score):
    x, weight, shards = torch.randn(8, 64), torch.randn(32, 64), 4
    factor = SCORES[score] or (lambda _: None)
    whole = nm_select_reference(x, factor(weight), 2, 4)
    parts = zip(x.chunk(shards, -1), weight.chunk(shards, -1), strict=True)
    local = [nm_select_reference(own, factor(part), 2, 4) for own, part in parts]
    assert torch.equal(torch.cat(local, -1), whole)
