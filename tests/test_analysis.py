"""What is known of a graph before it is changed: phase, names, decisions, the report's rows."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from amber_compile import AmberConfig, Plan, Settings, register_model, rule
from amber_compile.analysis import Analysis
from amber_compile.errors import PlanError
from amber_compile.plan import PlannedSite
from amber_compile.rule import ModelPreset

X = torch.randn(2, 4, 16)
SPARSE = Settings("2:4", "weight_norm", "norm")


def linear(out: int = 16) -> nn.Linear:
    return nn.Linear(16, out, bias=False)


class Layer(nn.Module):
    def __init__(self, keys: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.down_proj = linear(), linear(keys), linear()

    def forward(self, x):
        return self.down_proj(self.q_proj(x) + self.k_proj(x).sum(-1, keepdim=True))


class Model(nn.Module):
    def __init__(self, layers: int = 2, keys: int = 8, vocabulary: int = 96) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(keys) for _ in range(layers))
        self.lm_head = linear(vocabulary)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def analyse(function, *inputs, grad=False, dynamic=None, **options) -> Analysis:
    found = []

    def probe(gm, example_inputs):
        found.append(Analysis.of(gm, example_inputs, AmberConfig(**options)))
        assert found[0].needs_grad is grad  # asked while tracing, as the backend does
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=probe, dynamic=dynamic)(*(inputs or (X,)))
    return found[0]


def reasons(analysis: Analysis, owner: int = 0) -> dict[str, str | None]:
    names = analysis.names[owner]
    decided = analysis.decisions(names)
    return {name: one.reason for name, one in zip(names, decided, strict=True)}


# ---- the graph ----


def test_a_graph():
    analysis = analyse(Layer())
    assert analysis.names == [("q_proj", "k_proj", "down_proj")]
    assert analysis.phase == "prefill"
    weights = [analysis.inputs[at] for at in analysis.positions]
    assert [tuple(weight.shape) for weight in weights] == [(16, 16), (8, 16), (16, 16)]
    assert all(isinstance(weight, nn.Parameter) for weight in weights)


def test_a_graph_without_projections():
    analysis = analyse(lambda x: x + 1)
    (names,) = analysis.names
    assert names == analysis.decisions(names) == ()
    assert analysis.sites(names, ()) == []


@pytest.mark.parametrize(
    ("shape", "given", "least"),
    [((2, 4, 16), 1, 1), ((2, 4, 16), 64, 64), ((8, 16), 1, 2), ((8, 16), 64, 64)],
)
def test_one_token_of_an_unknown_phase_is_decode(shape, given, least):
    analysis = analyse(linear(), torch.randn(shape), min_tokens=given)
    assert analysis.min_tokens == least


# ---- decisions ----


def test_decisions_follow_the_options():
    analysis = analyse(Layer())
    assert reasons(analysis) == {
        "q_proj": None,
        "k_proj": "rule: k_proj stays dense",
        "down_proj": None,
    }
    assert analysis.decisions(analysis.names[0])[0].settings == SPARSE
    assert set(reasons(analyse(Layer(), skip="*")).values()) == {"skip='*'"}


def test_decode_is_dense():
    found = reasons(analyse(Layer(), torch.randn(2, 1, 16)))
    assert found["q_proj"] == "decode: one token a sequence"


def test_few_tokens_are_dense_where_their_number_is_fixed():
    assert reasons(analyse(Layer(), min_tokens=9))["q_proj"] == (
        "8 tokens are fewer than min_tokens=9"
    )
    assert reasons(analyse(Layer(), min_tokens=8))["q_proj"] is None
    assert reasons(analyse(Layer(), min_tokens=9, dynamic=True))["q_proj"] is None


def test_gradients_are_an_obstacle():
    analysis = analyse(Layer(), grad=True)
    with torch.enable_grad():
        assert "gradients" in str(reasons(analysis)["q_proj"])


def test_no_gradients_without_anything_that_requires_them():
    assert not analyse(Layer().requires_grad_(False), grad=False).needs_grad
    with torch.enable_grad():
        analysis = analyse(Layer().requires_grad_(False), grad=False)
        assert not analysis.needs_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_has_no_factor(value):
    layer = Layer()
    with torch.no_grad():
        layer.q_proj.weight[0, 3] = value
    found = reasons(analyse(layer))
    assert "not finite in 1 of 16 input channels" in str(found["q_proj"])
    assert found["down_proj"] is None
    assert reasons(analyse(layer, score="magnitude"))["q_proj"] is None


def test_a_weight_that_the_graph_holds_itself():
    program = torch.export.export(nn.Sequential(Layer()), (X,)).module()
    analysis = Analysis.of(program, [X], AmberConfig(projections="*q_proj"))
    with torch.no_grad():
        assert "constant of the graph" in str(reasons(analysis)["0.q_proj"])
        analysis = Analysis.of(program, [X], AmberConfig(projections="*q_proj", score="magnitude"))
        assert reasons(analysis)["0.q_proj"] is None
    assert analysis.positions == []


# ---- plans ----


def plan(**changes: Settings | str) -> Plan:
    choices: dict[str, Settings | str] = {"q_proj": "no", "k_proj": SPARSE, "down_proj": "no"}
    shapes = {"q_proj": (16, 16), "k_proj": (8, 16), "down_proj": (16, 16)}
    return Plan({n: PlannedSite(shapes[n], c) for n, c in (choices | changes).items()})


def test_a_plan_decides():
    analysis = analyse(Layer(), plan=plan())
    assert reasons(analysis) == {"q_proj": "plan: no", "k_proj": None, "down_proj": "plan: no"}
    assert analysis.decisions(analysis.names[0])[1].settings == SPARSE


def test_a_plan_for_another_model():
    analysis = analyse(Layer(keys=4), plan=plan())
    with pytest.raises(PlanError, match=r"k_proj \[4, 16\] \(plan: \[8, 16\]\)"):
        analysis.decisions(analysis.names[0])


def test_what_a_plan_cannot_have_is_an_obstacle():
    analysis = analyse(Layer(), plan=plan(k_proj=Settings("8:32", "magnitude")))
    assert reasons(analysis)["k_proj"] == "K = 16 is not a multiple of M = 32"
    assert analysis.decisions(analysis.names[0])[1].obstacle


# ---- models of the paper, and parts of them ----


@pytest.fixture
def tiny(monkeypatch) -> ModelPreset:
    """Let the paper know a model of two layers, whose second keeps q dense."""
    shapes = {"q": (16, 16), "k": (8, 16), "down": (16, 16)}
    preset = ModelPreset("Tiny", 2, shapes, 96, frozenset({1}))
    monkeypatch.setattr(rule, "_presets", lambda: (preset,))
    return preset


LISTED = "rule: the paper keeps q and gate of layer 1 of Tiny dense"


def test_a_model_of_the_paper(tiny):
    found = reasons(analyse(Model()))
    assert found["layers.0.q_proj"] is None
    assert found["layers.1.q_proj"] == LISTED
    assert found["layers.1.down_proj"] is None


@pytest.mark.parametrize("other", [{"layers": 3}, {"keys": 4}, {"vocabulary": 97}])
def test_another_model(tiny, other):
    assert reasons(analyse(Model(**other)))["layers.1.q_proj"] is None


def test_a_layer_of_a_registered_model_of_the_paper(tiny):
    model = Model()
    register_model(model)
    analysis = analyse(model.layers[1])
    assert [names[0] for names in analysis.names] == ["layers.1.q_proj", "layers.0.q_proj"]
    assert reasons(analysis, owner=0)["layers.1.q_proj"] == LISTED
    assert reasons(analysis, owner=1)["layers.0.q_proj"] is None


def test_a_second_registered_model_does_not_hide_the_first(tiny):
    model, draft = Model(), Model(layers=1, keys=4)
    register_model(model)
    register_model(draft)
    assert reasons(analyse(model.layers[1]))["layers.1.q_proj"] == LISTED
    assert reasons(analyse(draft.layers[0]))["layers.0.q_proj"] is None


def test_a_layer_of_no_registered_model(tiny):
    assert reasons(analyse(Model().layers[1]))["q_proj"] is None


def test_a_registered_model_compiled_as_a_whole(tiny):
    model = Model()
    register_model(model)
    assert reasons(analyse(model))["layers.1.q_proj"] == LISTED


# ---- rows of the report ----


def test_the_rows_of_a_report():
    analysis = analyse(Layer())
    (names,) = analysis.names
    rows = analysis.sites(names, analysis.decisions(names))
    assert [(row.name, row.shape, row.macs, row.role, row.share, row.kernel) for row in rows] == [
        ("q_proj", (16, 16), 256, "q", 1, "nm_select, C++"),
        ("k_proj", (8, 16), 128, "k", 0, ""),
        ("down_proj", (16, 16), 256, "down", 1, "nm_select, C++"),
    ]
    assert {row.operator for row in rows} == {"linear"}


def test_the_rows_of_another_owner_have_its_names():
    model = Model()
    register_model(model)
    analysis = analyse(model.layers[0])
    names = analysis.names[1]
    rows = analysis.sites(names, analysis.decisions(names))
    assert [row.name for row in rows] == [
        "layers.1.q_proj",
        "layers.1.k_proj",
        "layers.1.down_proj",
    ]


def test_a_row_is_per_token_of_the_graph():
    model = nn.Sequential(Layer(), linear())

    def last(x):
        return model[1](model[0](x)[:, -1])

    analysis = analyse(last)
    (names,) = analysis.names
    rows = analysis.sites(names, analysis.decisions(names))
    assert [row.macs for row in rows] == [256, 128, 256, 64]  # a quarter of the tokens


def test_a_projection_called_twice_has_one_row():
    layer = Layer()
    analysis = analyse(lambda x: layer(layer(x)))
    (names,) = analysis.names
    rows = analysis.sites(names, analysis.decisions(names))
    assert [(row.name, row.macs) for row in rows] == [
        ("q_proj", 512),
        ("k_proj", 256),
        ("down_proj", 512),
    ]


def test_half_of_a_fused_projection_has_half_a_share():
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = linear(32)

        def forward(self, x):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return silu(gate) * up

    analysis = analyse(Mlp())
    (names,) = analysis.names
    (row,) = analysis.sites(names, analysis.decisions(names))
    assert row.decision.settings == Settings("2:4", "weight_norm", "norm", part="gate")
    assert row.share == 0.5
