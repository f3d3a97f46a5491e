"""What the rule says of a name: its role, its layer, and whether it is sparse."""

import json
from importlib import resources

import pytest
from torch.fx import Graph

from amber_compile import AmberConfig, Plan, Projection, Settings
from amber_compile.plan import PlannedSite
from amber_compile.rule import (
    ModelPreset,
    Planned,
    Rule,
    find_preset,
    first_match,
    layer_of,
    role_of,
)


def projection(name: str, gate_rows: int | None = None) -> Projection:
    node = Graph().placeholder("x")
    return Projection(name, node, node, node, (8, 16), False, "linear", gate_rows)


def choose(name: str, preset: ModelPreset | None = None, gate_rows=None, **options):
    return Rule(AmberConfig(**options), preset).choose(projection(name, gate_rows))


# ---- roles ----

ROLES = {
    "q": [
        "model.layers.0.self_attn.q_proj",
        "self_attn.q_proj",
        "q_proj",
        "bert.encoder.layer.0.attention.self.query",
        "transformer.layer.0.attention.q_lin",
    ],
    "k": ["model.layers.0.self_attn.k_proj", "bert.encoder.layer.0.attention.self.key"],
    "v": ["model.layers.0.self_attn.v_proj", "bert.encoder.layer.0.attention.self.value"],
    "o": [
        "model.layers.0.self_attn.o_proj",
        "model.decoder.layers.0.self_attn.out_proj",
        "bert.encoder.layer.0.attention.output.dense",  # not the "output.dense" of the MLP
        "gpt_neox.layers.0.attention.dense",
        "transformer.h.0.self_attention.dense",
        "transformer.h.0.attn.c_proj",  # not the "c_proj" of the MLP
    ],
    "qkv": [
        "model.layers.0.self_attn.qkv_proj",
        "gpt_neox.layers.0.attention.query_key_value",
        "transformer.h.0.attn.c_attn",
    ],
    "gate": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.shared_experts.gate_proj"],
    "up": [
        "model.layers.0.mlp.up_proj",
        "model.decoder.layers.0.fc1",
        "transformer.h.0.mlp.c_fc",
        "gpt_neox.layers.0.mlp.dense_h_to_4h",
        "bert.encoder.layer.0.intermediate.dense",
    ],
    "down": [
        "model.layers.0.mlp.down_proj",
        "model.decoder.layers.0.fc2",
        "transformer.h.0.mlp.c_proj",
        "gpt_neox.layers.0.mlp.dense_4h_to_h",
        "bert.encoder.layer.0.output.dense",
    ],
    "gate+up": ["model.layers.0.mlp.gate_up_proj"],
    "expert gate+up": ["model.layers.0.mlp.experts.gate_up_proj"],
    "expert down": ["model.layers.0.mlp.experts.down_proj"],
    "router": [
        "model.layers.0.mlp.gate",  # not a gate projection
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.mlp.router",
        "model.layers.0.mlp.shared_expert_gate",
    ],
    "latent q": ["model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.q_b_proj"],
    "latent kv": [
        "model.layers.0.self_attn.kv_a_proj_with_mqa",
        "model.layers.0.self_attn.kv_b_proj",
    ],
    "head": ["lm_head", "embed_out", "score", "bert.pooler.dense", "cls.predictions.decoder"],
    "adapter": ["model.layers.0.self_attn.q_proj.lora_A.default", "lm_head.lora_B.default"],
    "unknown": [
        *("", "0", "weight", "proj", "model.layers.0.mlp.my_q_proj_2", "model.layers.0.gate"),
        *("q_projection", "lora_A", "lm_heads", "q_proj.x"),
    ],
}


@pytest.mark.parametrize(
    ("name", "role"), [(name, role) for role, names in ROLES.items() for name in names]
)
def test_the_role_of_a_name(name, role):
    assert role_of(name) == role


def test_every_role_in_the_file_has_a_fate():
    data = json.loads(resources.files("amber_compile").joinpath("presets/roles.json").read_text())
    roles = {role for _, role in data["names"]}
    fates = {*data["sparse"], *data["dense"], *data["fused gate"]}
    assert roles <= fates
    assert set(data["skippable"]) <= set(data["sparse"])
    assert not set(data["sparse"]) & set(data["dense"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.self_attn.q_proj", 0),
        ("model.layers.31.mlp.experts.7.down_proj", 31),
        ("0.q_proj", 0),
        ("layers.12", 12),
        ("lm_head", None),
        ("q_proj2.fc1", None),
        ("", None),
    ],
)
def test_the_layer_of_a_name(name, layer):
    assert layer_of(name) == layer


# ---- the rule ----


@pytest.mark.parametrize(
    "name", ["q_proj", "mlp.gate_proj", "mlp.down_proj", "layer.0.output.dense"]
)
def test_what_the_rule_sparsifies(name):
    assert choose(name) == Settings("2:4", "weight_norm", "norm")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("k_proj", "rule: k_proj stays dense"),
        ("v_proj", "rule: v_proj stays dense"),
        ("o_proj", "rule: o_proj stays dense"),
        ("mlp.up_proj", "rule: up_proj stays dense"),
        ("lm_head", "rule: heads stay dense"),
        ("mlp.gate", "rule: routers stay dense"),
        ("mlp.down_proj.lora_A.default", "rule: adapters are small and stay dense"),
        ("qkv_proj", "rule: q is fused with k and v, which stay dense; list it in projections="),
        ("gate_up_proj", "rule: gate is fused with up, which stays dense, and the graph does not"),
        ("gate_proj_2", "rule: the name says no role; list it in projections= to sparsify it"),
    ],
)
def test_what_the_rule_leaves_dense(name, reason):
    assert choose(name).startswith(reason)


@pytest.mark.parametrize("name", ["mlp.gate_up_proj", "mlp.experts.gate_up_proj"])
def test_the_gate_of_a_fused_projection_where_it_shows(name):
    assert choose(name, gate_rows=4) == Settings("2:4", "weight_norm", "norm", part="gate")


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("layers.0.mlp.down_proj", "robust_norm"),
        ("layers.0.mlp.shared_experts.down_proj", "robust_norm"),  # sees every token
        ("layers.0.mlp.experts.down_proj", "weight_norm"),
        ("layers.0.mlp.experts.7.down_proj", "weight_norm"),
    ],
)
def test_no_robust_norm_for_experts(name, score):
    assert choose(name, preset=None, score="robust_norm").score == score


def test_other_scores_are_for_experts_too():
    assert choose("layers.0.mlp.experts.down_proj", score="magnitude").score == "magnitude"


# ---- projections= and skip= ----


@pytest.mark.parametrize(
    ("name", "options", "sparse"),
    [
        ("layers.0.v_proj", {"projections": ["*.v_proj"]}, True),
        ("layers.0.q_proj", {"projections": ["*.v_proj"]}, False),
        ("v_proj", {"projections": ["*.v_proj"]}, True),  # in a layer compiled on its own
        ("my_v_proj", {"projections": ["*.v_proj"]}, False),
        ("layers.0.v_proj", {"projections": ["*"]}, True),
        ("layers.0.v_proj", {"projections": ["layers.0.*"]}, True),
        ("layers.10.v_proj", {"projections": ["layers.1.*"]}, False),
        ("layers.1.v_proj", {"projections": ["layers.[0-3].*"]}, True),
        ("layers.0.V_proj", {"projections": ["*.v_proj"]}, False),
        ("layers.0.v_proj", {"projections": []}, False),
        ("lm_head", {"projections": ["lm_head"]}, True),
        ("layers.0.q_proj", {"skip": ["*.q_proj"]}, False),
        ("q_proj", {"skip": ["*.q_proj"]}, False),
        ("layers.0.q_proj", {"skip": ["*.k_proj"]}, True),
        ("layers.0.q_proj", {"projections": ["*"], "skip": ["layers.0.*"]}, False),
    ],
)
def test_projections_and_skip(name, options, sparse):
    assert isinstance(choose(name, **options), Settings) is sparse


def test_the_reason_names_the_option():
    assert choose("q_proj", skip=["a", "*.q_proj"]) == "skip='*.q_proj'"
    assert choose("q_proj", projections=["a", "b"]) == "not among projections=['a', 'b']"


def test_a_listed_fused_projection_is_sparse_as_a_whole():
    chosen = choose("mlp.gate_up_proj", gate_rows=4, projections=["*.gate_up_proj"])
    assert chosen == Settings("2:4", "weight_norm", "norm")


def test_skip_goes_before_a_plan():
    plan = Plan({"q_proj": PlannedSite((8, 16), Settings()), "k": PlannedSite((8, 16), "no")})
    one, other = projection("q_proj"), projection("k")
    assert Planned(plan, ()).choose(one) == Settings()
    assert Planned(plan, ()).choose(other) == "plan: no"
    assert Planned(plan, ("q_*",)).choose(one) == "skip='q_*'"


def test_the_first_match_is_told():
    assert first_match("a.b", ["c", "a.*", "*"]) == "a.*"
    assert first_match("a.b", ["b"]) is None
    assert first_match("a.b", []) is None


# ---- the models of the paper ----

Shapes = dict[str, tuple[int, ...]]


def llama(layers: int = 32, hidden: int = 4096, vocabulary: int = 128256) -> tuple[Shapes, list]:
    """Return the projections and parameter shapes of a Llama-3.1-8B."""
    widths = {"self_attn.q_proj": hidden, "self_attn.k_proj": 1024, "mlp.gate_proj": 14336}
    shapes = {
        f"model.layers.{layer}.{name}": (width, hidden)
        for layer in range(layers)
        for name, width in widths.items()
    }
    shapes |= {f"model.layers.{layer}.mlp.down_proj": (hidden, 14336) for layer in range(layers)}
    shapes["lm_head"] = (vocabulary, hidden)
    return shapes, [*shapes.values(), (vocabulary, hidden), (hidden,)]


def test_a_model_is_recognised_by_its_shapes():
    assert find_preset(*llama()).name == "Llama-3.1-8B"


@pytest.mark.parametrize(
    "other", [{"layers": 31}, {"layers": 33}, {"hidden": 2048}, {"vocabulary": 32000}]
)
def test_another_model_is_not(other):
    assert find_preset(*llama(**other)) is None


def test_one_layer_of_another_shape_is_another_model():
    shapes, parameters = llama()
    shapes["model.layers.5.self_attn.q_proj"] = (2048, 4096)
    assert find_preset(shapes, parameters) is None


def test_nothing_is_no_model():
    assert find_preset({}, []) is None


PAPER = json.loads(resources.files("amber_compile").joinpath("presets/paper.json").read_text())


NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
    "expert gate+up": "mlp.experts.gate_up_proj",
    "expert down": "mlp.experts.down_proj",
}


@pytest.mark.parametrize("entry", PAPER["models"], ids=lambda entry: entry["name"])
def test_each_model_is_recognised(entry):
    shapes = {
        f"model.layers.{layer}.{NAMES[role]}": tuple(shape)
        for layer in range(entry["layers"])
        for role, shape in entry["shapes"].items()
    }
    embedding = (entry["vocabulary"], 64)
    assert find_preset(shapes, [*shapes.values(), embedding]).name == entry["name"]
    assert find_preset(shapes, shapes.values()) is None


@pytest.mark.parametrize("entry", PAPER["models"], ids=lambda entry: entry["name"])
def test_the_listed_layers_of_each_model_stay_dense(entry):
    shapes = {role: tuple(shape) for role, shape in entry["shapes"].items()}
    dense = frozenset(entry["dense_layers"])
    preset = ModelPreset(entry["name"], entry["layers"], shapes, entry["vocabulary"], dense)
    assert max(dense) < entry["layers"]
    for layer in range(entry["layers"]):
        for name in ("self_attn.q_proj", "mlp.gate_proj"):
            chosen = choose(f"model.layers.{layer}.{name}", preset)
            assert isinstance(chosen, str) is (layer in dense)
            if layer in dense:
                assert chosen == (
                    f"rule: the paper keeps q and gate of layer {layer} of {entry['name']} dense"
                )
        assert isinstance(choose(f"model.layers.{layer}.mlp.down_proj", preset), Settings)


def test_a_listed_projection_is_sparse_in_a_listed_layer():
    preset = find_preset(*llama())
    name = "model.layers.19.self_attn.q_proj"
    assert choose(name, preset).startswith("rule: the paper keeps")
    assert choose(name, preset, projections=["*.q_proj"]) == Settings("2:4", "weight_norm", "norm")


def test_the_share_of_macs_is_that_of_the_paper():
    """56.1 % of Llama-3.1-8B's linear MACs: q, gate but for five layers, and down."""
    shapes, parameters = llama()
    shapes |= {f"model.layers.{layer}.self_attn.v_proj": (1024, 4096) for layer in range(32)}
    shapes |= {f"model.layers.{layer}.self_attn.o_proj": (4096, 4096) for layer in range(32)}
    shapes |= {f"model.layers.{layer}.mlp.up_proj": (14336, 4096) for layer in range(32)}
    del shapes["lm_head"]
    preset = find_preset(shapes, parameters)
    macs = {name: rows * channels for name, (rows, channels) in shapes.items()}
    sparse = sum(macs[name] for name in shapes if isinstance(choose(name, preset), Settings))
    assert round(100 * sparse / sum(macs.values()), 1) == 56.1
