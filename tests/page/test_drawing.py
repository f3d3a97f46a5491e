"""Drawings: which boxes a graph becomes, where they stand, and that the picture is well formed."""

import itertools
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
from deep import deep_sketch

from amber_compile.page.boxes import Box
from amber_compile.page.collapse import scene_of
from amber_compile.page.drawing import MOST, draw, draw_pair
from amber_compile.page.layout import GAP, layout_of
from amber_compile.sketch import SketchNode, layer

SVG = "{http://www.w3.org/2000/svg}"
LAYER = "model.layers.1"
BEFORE, AFTER = (layer(deep_sketch(3, selects=one), LAYER) for one in (False, True))


def node(name: str, *inputs: str, target: str = "op", module: str = "m", **more) -> SketchNode:
    return SketchNode(
        name, "call_function", target, inputs, "f32[2]", arguments=", ".join(inputs), module=module
    )._replace(**more)


def boxes(before, after=None, side: int = 1) -> list[Box]:
    scene = scene_of(before, before if after is None else after, LAYER)
    return [pair[side] for pair in scene.boxes.values() if pair[side] is not None]


def drawn(text: str) -> dict[tuple[str, ...], ElementTree.Element]:
    """Return the boxes of a picture by their lines of text."""
    root = ElementTree.fromstring(text)
    groups = [group for group in root.iter(f"{SVG}g") if "box" in group.get("class", "")]
    return {tuple(one.text for one in group.iter(f"{SVG}text")): group for group in groups}


def places(text: str) -> dict[str, tuple[float, float]]:
    """Return the middle of the upper edge of each projection's box."""
    return {
        group.get("data-site"): (
            round(float(rect.get("x")) + float(rect.get("width")) / 2),
            float(rect.get("y")),
        )
        for group in drawn(text).values()
        for rect in [group.find(f"{SVG}rect")]
        if group.get("data-site")
    }


# ---- boxes ----


def test_a_layer_becomes_few_boxes():
    assert len([one for one in BEFORE if one.op != "placeholder"]) > 50
    assert len(boxes(BEFORE)) < 25


def test_projections_and_selections_stand_alone():
    kinds = Counter(box.kind for box in boxes(BEFORE, AFTER))
    assert (kinds["sparse"], kinds["dense"], kinds["amber"]) == (3, 4, 3)
    kinds = Counter(box.kind for box in boxes(BEFORE, AFTER, side=0))
    assert (kinds["sparse"], kinds["dense"], kinds["amber"]) == (0, 7, 0)


def test_changed_boxes_say_so():
    states = {(box.title, box.state) for box in boxes(BEFORE, AFTER) if box.state}
    assert states == {
        ("nm_select", "new"),
        ("q_proj", "changed"),
        ("gate_proj", "changed"),
        ("down_proj", "changed"),
    }
    assert not [box for box in boxes(BEFORE) if box.state]


def test_a_box_that_the_pass_removed():
    before = (node("a"), node("b", "a"), node("c", "b", target="linear", site=f"{LAYER}.q"))
    after = (before[0], node("c", "a", target="linear", site=f"{LAYER}.q"))
    assert [box.state for box in boxes(before, after, side=0)] == ["", "removed", "changed"]


def test_a_selection_shows_its_pattern_and_a_projection_its_weight():
    found = boxes(BEFORE, AFTER)
    assert {box.detail for box in found if box.kind == "amber"} == {"2:4 · norm correction"}
    assert [box.detail for box in found if box.title == "gate_proj"] == [
        "linear 28672\N{MULTIPLICATION SIGN}8192"
    ]


def test_a_chain_is_merged():
    chain = (node("a"), node("b", "a"), node("c", "b", target="other"))
    assert boxes(chain) == [Box("other", "m: 3 ops", "op · other")]


def test_a_diamond_is_merged():
    diamond = (node("a"), node("b", "a"), node("c", "a"), node("d", "b", "c"))
    assert [box.title for box in boxes(diamond)] == ["m: 4 ops"]


def test_merging_makes_no_cycle():
    around = (node("a"), node("p", "a", target="linear", site="q"), node("b", "a", "p"))
    assert [box.title for box in boxes(around)] == ["op", "q", "op"]


@pytest.mark.parametrize(
    "more", [{"module": "n"}, {"target": "scaled_dot_product_attention"}, {"target": "amber.f"}]
)
def test_what_is_not_merged(more):
    assert len(boxes((node("a"), node("b", "a", **more)))) == 2


def test_parameters_and_numbers_are_left_out():
    sketch = (
        SketchNode("w", "placeholder", "m.weight", value="f32[2]", module="m"),
        SketchNode("x", "placeholder", "x", value="f32[2]"),
        SketchNode("s0", "placeholder", "s0"),
        node("n", "w", value=""),
        node("y", "x", "w", "n"),
    )
    assert [(box.kind, box.title) for box in boxes(sketch)] == [("input", "x"), ("other", "op")]


def test_what_another_layer_gives_is_an_input():
    assert boxes((node("a", "hidden_states_7"),))[1] == Box("input", "hidden_states")


# ---- places ----


def test_boxes_of_a_row_keep_apart_and_edges_lead_down():
    scene = scene_of(BEFORE, AFTER)
    edges = scene.edges[1]
    widths = dict.fromkeys(scene.boxes, 100.0)
    layout = layout_of(widths, edges)
    assert all(layout.rank[a] < layout.rank[b] for a, b in edges)
    rows = {}
    for key in widths:
        rows.setdefault(layout.rank[key], []).append(layout.x[key])
    for row in rows.values():
        gaps = [b - a for a, b in itertools.pairwise(sorted(row))]
        assert all(gap >= 100 + GAP - 0.01 for gap in gaps)
    assert min(layout.x.values()) >= 50 - 0.01
    assert max(layout.x.values()) <= layout.width - 50 + 0.01


def test_a_chain_stands_in_a_line():
    names = "abcdef"
    layout = layout_of(dict.fromkeys(names, 50.0), list(itertools.pairwise(names)))
    assert len({round(x, 3) for x in layout.x.values()}) == 1
    assert [layout.rank[name] for name in names] == list(range(6))


def test_a_long_edge_passes_beside_the_boxes_in_a_straight_line():
    edges = [*itertools.pairwise("abcde"), ("a", "e")]
    layout = layout_of(dict.fromkeys("abcde", 60.0), edges)
    bends = layout.bends["a", "e"]
    assert len(bends) == 3
    assert len({round(x, 3) for x in bends}) == 1
    assert all(abs(bends[0] - layout.x[key]) >= 30 for key in "bcd")


def test_a_source_stands_close_to_its_reader():
    layout = layout_of(dict.fromkeys("abcs", 50.0), [("a", "b"), ("b", "c"), ("s", "c")])
    assert layout.rank["s"] == layout.rank["b"]


def test_crossings_are_avoided():
    edges = [("a", "d"), ("b", "c"), ("r", "a"), ("r", "b")]
    layout = layout_of(dict.fromkeys("rabcd", 50.0), edges)
    assert (layout.x["a"] < layout.x["b"]) == (layout.x["d"] < layout.x["c"])


def test_nothing_takes_no_room():
    assert layout_of({}, []).rows == 0


# ---- pictures ----


def test_a_picture_is_a_document_with_its_own_style():
    root = ElementTree.fromstring(draw(AFTER, within=LAYER))
    assert root.tag == f"{SVG}svg"
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text
    assert root.get("aria-label")


def test_both_sides_show_what_they_share_at_the_same_place():
    before, after = draw_pair(BEFORE, AFTER, within=LAYER)
    assert places(before) == places(after)
    assert len(places(after)) == 7
    assert ElementTree.fromstring(before).get("viewBox") == ElementTree.fromstring(after).get(
        "viewBox"
    )


def test_only_the_second_side_has_selections():
    before, after = draw_pair(BEFORE, AFTER, within=LAYER)
    selections = [lines for lines in drawn(after) if lines[0] == "nm_select"]
    assert selections == [("nm_select", "2:4 · norm correction", "new")]
    assert not [lines for lines in drawn(before) if lines[0] == "nm_select"]


def test_a_fused_projection_stands_where_it_stood():
    x = SketchNode("x", "placeholder", "x", value="f32[2]")
    before = (
        x,
        node("s", "x", target="amber.nm_select", arguments="x, 2, 4"),
        node("y", "s", target="linear", site="q"),
        node("z", "y"),
    )
    after = (x, node("nm_linear", "x", target="amber.nm_linear", site="q"), node("z", "nm_linear"))
    pictures = draw_pair(before, after)
    assert places(pictures[0]) == places(pictures[1])
    assert [list(drawn(one)) for one in pictures] == [
        [("x",), ("nm_select", "2:4", "removed"), ("q", "linear", "changed"), ("op", "f32[2]")],
        [("x",), ("q", "amber.nm_linear", "changed"), ("op", "f32[2]")],
    ]


def test_an_edge_for_every_pair_of_boxes():
    scene = scene_of(BEFORE, AFTER, LAYER)
    for text, edges in zip(draw_pair(BEFORE, AFTER, within=LAYER), scene.edges, strict=True):
        assert len(list(ElementTree.fromstring(text).iter(f"{SVG}path"))) == len(edges)


def test_the_same_graph_gives_the_same_picture():
    assert draw_pair(BEFORE, AFTER, within=LAYER) == draw_pair(BEFORE, AFTER, within=LAYER)


def test_a_pass_that_turns_an_edge_around():
    before = (node("a", module="1"), node("b", "a", module="2"))
    after = (node("b", module="2"), node("a", "b", module="1"))
    for text in draw_pair(before, after):
        assert len(list(ElementTree.fromstring(text).iter(f"{SVG}path"))) == 1


def test_names_are_escaped():
    hostile = '<script>alert("1")</script>&'
    text = draw((node("a", target=hostile), node("b", "a", site=hostile)))
    assert "<script" not in text
    assert {lines[0] for lines in drawn(text)} == {hostile}


def test_a_graph_too_large_to_read_is_not_drawn():
    many = [node(f"n{at}", module=str(at)) for at in range(MOST + 1)]
    assert f"{MOST + 1} operations are too many" in draw(tuple(many))


def test_nothing_can_be_drawn():
    assert ElementTree.fromstring(draw(())).tag == f"{SVG}svg"
