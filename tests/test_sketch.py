"""Sketches: what is taken down of a graph, what is kept, and how a layer of it is read."""

import json
import marshal
import re
from functools import partial

import pytest
import torch
from deep import deep_sketch
from torch import nn
from torch.nn.functional import silu

from amber_compile import last_reports, register_model
from amber_compile import rewritten as rewriting
from amber_compile.errors import OptionError
from amber_compile.passes.fuse_projections import fuse_projections
from amber_compile.report import GraphReport
from amber_compile.sketch import (
    SketchNode,
    Stage,
    by_layer,
    diff,
    layer,
    layer_path,
    layers,
    lines,
)
from amber_compile.stages import LONGEST

X = torch.randn(2, 8, 16)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q_proj, self.down_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.down_proj(silu(self.q_proj(self.norm(x))))


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.lm_head = nn.Linear(16, 32)

    def forward(self, x):
        for one in self.layers:
            x = one(x)
        return self.lm_head(x)


@torch.no_grad()
def compiled(model: nn.Module, x: torch.Tensor = X, dynamic=None, **options) -> list[GraphReport]:
    torch.compile(model, backend="amber_eager", options=options, dynamic=dynamic)(x)
    return [graph for report in last_reports() for graph in report.graphs]


# ---- what is taken down ----


def test_a_sparse_graph_has_two_stages():
    (graph,) = compiled(Model())
    assert [stage.name for stage in graph.stages] == ["traced", "sparsify_projections"]


@pytest.mark.parametrize(
    ("x", "options"), [(X[:, :1], {}), (X, {"projections": "nothing"})], ids=["decode", "prefill"]
)
def test_a_dense_graph_has_one_stage(x, options):
    (graph,) = compiled(Model(), x, **options)
    assert [stage.name for stage in graph.stages] == ["traced"]
    assert graph.rewritten == 0


def test_a_node_says_what_it_computes_and_where():
    (graph,) = compiled(Model(), dynamic=True)
    sketch = graph.stages[0].sketch
    (site,) = [node for node in sketch if node.site == "layers.1.q_proj"]
    assert (site.op, site.target, site.module) == ("call_function", "linear", "layers.1.q_proj")
    assert re.fullmatch(r"f32\[s\d+, s\d+, 16\]", site.value)
    held = {node.name: node.target for node in sketch if node.op == "placeholder"}
    assert [held.get(one) for one in site.inputs[1:]] == [
        "layers.1.q_proj.weight",
        "layers.1.q_proj.bias",
    ]


def test_every_projection_is_named_as_in_the_report():
    (graph,) = compiled(Model())
    for stage in graph.stages:
        named = [node.site for node in stage.sketch if node.site]
        assert named == [site.name for site in graph.sites]


def test_what_is_given_belongs_to_no_module_and_what_is_held_does():
    (graph,) = compiled(Model())
    inputs = [node for node in graph.stages[0].sketch if node.op == "placeholder"]
    assert [node.target for node in inputs if not node.module] == ["x"]
    assert {node.module for node in inputs if node.target.endswith("norm.weight")} == {
        "layers.0.norm",
        "layers.1.norm",
    }


def test_only_what_the_pass_changed_differs():
    (graph,) = compiled(Model())
    before, after = (set(stage.sketch) for stage in graph.stages)
    assert {node.target for node in before - after} == {"linear"}
    assert {node.target for node in after - before if node.op != "placeholder"} == {
        "linear",
        "amber.nm_select",
    }


def test_a_fused_projection_keeps_its_name(monkeypatch):
    fuse = partial(fuse_projections, why_separate=lambda *_: None)
    monkeypatch.setattr(rewriting, "fuse_projections", fuse)
    (graph,) = compiled(Model())
    *_, fused = graph.stages
    assert fused.name == "fuse_projections"
    sites = {node.site: node.target for node in fused.sketch if node.site}
    assert list(sites) == [site.name for site in graph.sites]
    assert sites["layers.1.q_proj"] == "amber.nm_linear"
    assert sites["lm_head"] == "linear"


def test_a_table_of_constants_is_cut_short():
    class Table(nn.Module):
        def forward(self, x):
            return x + torch.tensor(list(range(1000)), dtype=torch.float32)[:16]

    (graph,) = compiled(Table())
    longest = max(len(node.arguments) for node in graph.stages[0].sketch)
    assert LONGEST < longest <= LONGEST + 1


def test_layers_compiled_one_by_one_have_qualified_names():
    model = Model()
    register_model(model)
    for one in model.layers:
        one.compile(backend="amber_eager")
    with torch.no_grad():
        model(X)
    (graph,) = [graph for report in last_reports() for graph in report.graphs]
    sites = [node.site for node in graph.stages[1].sketch if node.site]
    assert sites == ["layers.0.q_proj", "layers.0.down_proj"]
    assert layers(graph.stages[1].sketch) == ["layers.0"]


def test_each_variant_of_a_shared_graph_is_taken_down():
    model = Model(3)
    register_model(model)
    for one in model.layers:
        one.compile(backend="amber_eager", options={"skip": "layers.1.*"})
    with torch.no_grad():
        model(X)
    (graph,) = [graph for report in last_reports() for graph in report.graphs]
    assert [(stage.name, layers(stage.sketch)) for stage in graph.stages] == [
        ("traced", ["layers.0"]),
        ("sparsify_projections", ["layers.0"]),
        ("traced", ["layers.1"]),
    ]


def test_a_graph_that_fails_to_compile_is_taken_down(monkeypatch):
    from amber_compile import backend

    def fail(gm, inputs, config, rewritten):
        if rewritten:
            raise ValueError("not this one")
        return gm.forward

    monkeypatch.setattr(backend, "_run_eagerly", fail)
    with pytest.warns(UserWarning, match="not this one"):
        (graph,) = compiled(Model())
    assert [stage.name for stage in graph.stages] == ["traced", "sparsify_projections"]


def test_no_code_is_recorded_where_none_is_generated():
    (graph,) = compiled(Model())
    assert graph.code_files == []


# ---- what is kept ----


def test_a_stage_gives_back_what_it_was_made_of():
    sketch = deep_sketch(2, selects=True)
    stage = Stage.of("traced", sketch)
    assert stage.sketch == sketch
    assert stage.to_json() == {"name": "traced", "nodes": len(sketch)}


def test_a_stage_is_small():
    sketch = deep_sketch(32, selects=True)
    packed = Stage.of("traced", sketch).packed
    assert len(packed) < 30 * len(sketch)
    assert len(packed) < len(marshal.dumps(list(map(tuple, sketch)))) / 4


def test_a_report_with_stages_is_plain_json():
    (graph,) = compiled(Model())
    stages = json.loads(json.dumps(graph.to_json()))["stages"]
    assert [one["name"] for one in stages] == ["traced", "sparsify_projections"]


def test_a_sketch_is_plain_json():
    sketch = deep_sketch(1, selects=True)
    rows = json.loads(json.dumps(sketch))
    assert tuple(SketchNode(*row[:3], tuple(row[3]), *row[4:]) for row in rows) == sketch


# ---- a layer at a time ----


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layers.10.self_attn.q_proj", "model.layers.10"),
        ("model.layers.3", "model.layers.3"),
        ("transformer.h.0.mlp.experts.5.w1", "transformer.h.0"),
        ("0", "0"),
        ("0.weight", "0"),
        ("lm_head", ""),
        ("norm2.weight", ""),
        ("", ""),
    ],
)
def test_layer_path(name, path):
    assert layer_path(name) == path


def test_layers_are_listed_in_order():
    assert layers(deep_sketch(12, selects=False)) == [f"model.layers.{at}" for at in range(12)]


def test_a_layer_holds_its_nodes_and_the_inputs_they_read():
    part = layer(deep_sketch(12, selects=True), "model.layers.1")
    assert {node.layer for node in part if node.op != "placeholder"} == {"model.layers.1"}
    held = [node.target for node in part if node.target.endswith(".weight")]
    assert len(held) == 7
    assert all(target.startswith("model.layers.1.") for target in held)
    assert len([node for node in part if node.target == "factor"]) == 3


def test_any_module_can_be_read():
    part = layer(deep_sketch(2, selects=False), "model.layers.1.mlp")
    assert [node.target for node in part if node.op != "placeholder"] == [
        "linear",
        "silu",
        "linear",
        "mul",
        "linear",
    ]


def test_the_rest_belongs_to_no_layer():
    part = layer(deep_sketch(2, selects=False), "")
    assert [node.site for node in part if node.site] == ["lm_head"]
    assert {node.target for node in part} >= {"embedding", "output"}


def test_all_layers_at_once_are_what_each_is_alone():
    sketch = deep_sketch(3, selects=True)
    assert by_layer(sketch) == {name: layer(sketch, name) for name in [*layers(sketch), ""]}


def test_an_unknown_layer_is_an_error_that_names_the_closest():
    with pytest.raises(OptionError, match=r"unknown layer 'model.layer.1'; did you mean"):
        layer(deep_sketch(2, selects=False), "model.layer.1")


# ---- text ----


def test_a_line_reads_as_a_call():
    sketch = (
        SketchNode("w", "placeholder", "layers.0.q_proj.weight", value="f32[4, 8]"),
        SketchNode(
            "y", "call_function", "linear", ("x", "w"), "f32[2, 4]", "layers.0.q_proj", "x, w, None"
        ),
    )
    assert lines(sketch) == [
        "layers.0.q_proj.weight: f32[4, 8] = input",
        "y: f32[2, 4] = linear(x, layers.0.q_proj.weight, None)  # layers.0.q_proj",
    ]
    assert lines(sketch, within="layers.0") == [
        "q_proj.weight: f32[4, 8] = input",
        "y: f32[2, 4] = linear(x, q_proj.weight, None)  # q_proj",
    ]


def test_a_string_is_not_taken_for_a_name():
    sketch = (
        SketchNode("norm", "placeholder", "model.norm.weight"),
        SketchNode("y", "call_function", "f", ("norm",), arguments="norm, 'norm', norm_1"),
    )
    assert lines(sketch)[1] == "y = f(model.norm.weight, 'norm', norm_1)"


def test_a_diff_shows_the_selection():
    (graph,) = compiled(Model())
    before, after = (layer(stage.sketch, "layers.1") for stage in graph.stages)
    changed = [
        line.split(":")[0] + line.partition("=")[2]
        for line in diff(before, after, within="layers.1", context=0).splitlines()[2:]
        if line[0] in "+-" and "q_proj" in line
    ]
    assert len(changed) == 2
    assert changed[0].startswith("-")
    assert "linear(nm_select" in changed[1]


def test_equal_sketches_have_no_diff():
    assert diff(deep_sketch(2, selects=True), deep_sketch(2, selects=True)) == ""
