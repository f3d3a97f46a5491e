"""A rewritten copy: what it computes, what it must be given, and that it is a copy."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import linear, silu

from amber_compile import AmberConfig
from amber_compile import rewritten as rewriting
from amber_compile.analysis import Analysis
from amber_compile.derivations import Matrix, ScoreFactor
from amber_compile.derived import derive
from amber_compile.errors import VerifyError
from amber_compile.kernels import nm_select
from amber_compile.rewritten import Rewritten

X = torch.randn(2, 8, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.gate_up_proj = nn.Linear(16, 64)
        self.down_proj = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(self.q_proj(x) + self.k_proj(x)).chunk(2, -1)
        return self.down_proj(silu(gate) * up)


def analyse(function, *inputs, dynamic=None, **options) -> Analysis:
    found = []

    def probe(gm, example_inputs):
        found.append(Analysis.of(gm, example_inputs, AmberConfig(**options)))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=probe, dynamic=dynamic)(*(inputs or (X,)))
    return found[0]


@torch.no_grad()
def rewritten(analysis: Analysis) -> Rewritten:
    return rewriting.rewrite_graph(analysis, analysis.decisions(analysis.names[0]))


@torch.no_grad()
def run(analysis: Analysis, result: Rewritten, *inputs: torch.Tensor) -> torch.Tensor:
    """Call the copy as the binding does: with the factors of the weights appended."""
    given = list(analysis.inputs)
    factors = [derive(given[one.position], one.request) for one in result.derived]
    return result.gm(*given, *factors)[0]


# ---- what it computes ----


def test_it_computes_what_the_settings_say():
    block = Block()
    analysis = analyse(block, correction=None)
    result = rewritten(analysis)

    def select(x, weight):
        return nm_select(x, derive(weight, ScoreFactor("weight_norm")), 2, 4)

    with torch.no_grad():
        q, gate_up = block.q_proj, block.gate_up_proj
        x = q(select(X, q.weight)) + block.k_proj(X)
        gate = linear(select(x, gate_up.weight[:32]), gate_up.weight[:32], gate_up.bias[:32])
        x = silu(gate) * linear(x, gate_up.weight[32:], gate_up.bias[32:])
        expected = block.down_proj(select(x, block.down_proj.weight))
    assert torch.equal(run(analysis, result), expected)
    assert [site.name for site, _ in result.sites] == ["q_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_everything_changes_no_bit(dtype):
    block, x = Block().to(dtype), X.to(dtype)
    analysis = analyse(block, x, pattern="4:4", projections=["*"])
    result = rewritten(analysis)
    assert len(result.sites) == 4
    with torch.no_grad():
        assert torch.equal(run(analysis, result), block(x))


def test_keeping_everything_changes_no_bit_under_autocast():
    block = Block()

    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    analysis = analyse(cast, pattern="4:4", correction=None, projections=["*"])
    result = rewritten(analysis)
    assert len(result.sites) == 4
    with torch.no_grad():
        assert torch.equal(run(analysis, result), cast(X))


def test_keeping_everything_changes_no_bit_within_autocast():
    block = Block()
    with torch.autocast("cpu", torch.bfloat16):
        analysis = analyse(block, pattern="4:4", correction=None, projections=["*"])
        result = rewritten(analysis)
        with torch.no_grad():
            assert torch.equal(run(analysis, result), block(X))


def test_fewer_tokens_than_asked_for_are_dense_at_run_time():
    block = Block()
    few, many = torch.randn(2, 4, 16), torch.randn(2, 16, 16)
    analysis = analyse(block, few, dynamic=True, min_tokens=16)
    result = rewritten(analysis)
    with torch.no_grad():
        assert torch.equal(run(analysis, result), block(few))
        factors = [derive(analysis.inputs[one.position], one.request) for one in result.derived]
        given = [many if value is few else value for value in analysis.inputs]
        given = [16 if isinstance(value, torch.SymInt) else value for value in given]
        assert not torch.equal(result.gm(*given, *factors)[0], block(many))


# ---- what it must be given ----


def test_the_derived_inputs_follow_the_graphs_own():
    analysis = analyse(Block())
    result = rewritten(analysis)
    places = result.gm.graph.find_nodes(op="placeholder")
    own, appended = places[: len(analysis.inputs)], places[len(analysis.inputs) :]
    assert [place.name for place in own] == [
        place.name for place in analysis.gm.graph.find_nodes(op="placeholder")
    ]
    assert len(appended) == len(result.derived) == len(result.values) == 3
    weights = [tuple(analysis.inputs[one.position].shape) for one in result.derived]
    assert weights == [(16, 16), (64, 16), (16, 32)]
    assert [one.request for one in result.derived] == [
        ScoreFactor("weight_norm"),
        ScoreFactor("weight_norm", Matrix(stop=32)),
        ScoreFactor("weight_norm"),
    ]


@pytest.mark.parametrize("dynamic", [None, True])
def test_their_example_values_are_static(dynamic):
    result = rewritten(analyse(Block(), dynamic=dynamic))
    assert all(isinstance(value, FakeTensor) for value in result.values)
    assert [tuple(value.shape) for value in result.values] == [(16,), (16,), (32,)]
    assert all(type(size) is int for value in result.values for size in value.shape)
    assert {value.dtype for value in result.values} == {torch.float32}


def test_nothing_is_derived_for_magnitude():
    result = rewritten(analyse(Block(), score="magnitude"))
    assert (result.derived, result.values) == ((), [])
    assert len(result.sites) == 3


# ---- that it is a copy ----


def test_the_graph_stays_as_dynamo_made_it():
    analysis = analyse(Block())
    before = str(analysis.gm.graph)
    rewritten(analysis)
    assert str(analysis.gm.graph) == before


def test_two_rewrites_are_two_graphs():
    analysis = analyse(Block())
    one, other = rewritten(analysis), rewritten(analysis)
    assert not set(one.gm.graph.nodes) & set(other.gm.graph.nodes)
    assert one.gm.code == other.gm.code


def test_dense_decisions_leave_the_copy_as_it_was():
    analysis = analyse(Block(), skip="*")
    result = rewritten(analysis)
    assert str(result.gm.graph) == str(analysis.gm.graph)
    assert (result.derived, result.values, result.sites) == ((), [], [])


# ---- again ----


def again(analysis: Analysis, result: Rewritten, **options: object) -> Analysis:
    """Analyse a rewritten graph, with its factors among its inputs."""
    given = list(analysis.inputs)
    factors = [derive(given[one.position], one.request) for one in result.derived]
    return Analysis.of(result.gm, [*given, *factors], AmberConfig(**options))


def test_a_rewritten_graph_stays_as_it_is():
    options = {"dense_prefix": 2, "projections": ["q_proj", "down_proj"]}
    first = analyse(Block(), **options)
    result = rewritten(first)
    second = again(first, result, **options, strict=True)
    decided = second.decisions(second.names[0])
    assert [one.reason for one in decided if one.reason != decided[1].reason] == [
        "its input is already a selection",
        "its input is already a selection",
    ]
    assert not any(one.obstacle for one in decided)
    assert str(rewritten(second).gm.graph) == str(result.gm.graph)


def test_what_was_left_dense_can_be_rewritten_later():
    block = Block()
    first = analyse(block, projections=["q_proj"])
    result = rewritten(first)
    second = again(first, result, projections=["*"])
    both = rewritten(second)
    assert [site.name for site, _ in both.sites] == ["k_proj", "gate_up_proj", "down_proj"]
    assert str(both.gm.graph).count("amber.nm_select") == 4
    whole = analyse(block, projections=["*"])
    assert torch.equal(run(second, both), run(whole, rewritten(whole)))


# ---- trust ----


def test_a_broken_rewrite_is_noticed(monkeypatch):
    sparsify = rewriting.sparsify_projections

    def careless(gm, decided, *rest):
        done = sparsify(gm, decided, *rest)
        (query, _), (_, _), (down, _) = done.sites
        query.node.replace_input_with(query.weight, down.weight)
        return done

    monkeypatch.setattr(rewriting, "sparsify_projections", careless)
    with pytest.raises(VerifyError, match="linear"):
        rewritten(analyse(Block()))
