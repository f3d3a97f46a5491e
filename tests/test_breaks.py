"""Graph breaks, read from what Dynamo records of them."""

import traceback

import torch
from torch._dynamo.output_graph import GraphCompileReason
from torch.fx import GraphModule, symbolic_trace

from amber_compile.breaks import Break, break_after, distinct
from amber_compile.table import break_list

FRAMES = [
    traceback.FrameSummary("outer.py", 3, "call", line="model(x)"),
    traceback.FrameSummary("model.py", 9, "forward", line='print("hi")'),
]
SAID = "No print\n  Explanation: Dynamo cannot print.\n  Hint: do not.\n"


def cause(said: str = SAID, frames: int = 2) -> GraphCompileReason:
    # graph_break=False while it is made: it would enter Dynamo's own list of breaks
    made = GraphCompileReason(said, FRAMES[:frames], graph_break=False)
    made.graph_break = True
    return made


def test_a_break_is_the_reason_in_a_line_and_the_users_innermost_line() -> None:
    one = Break.of(cause())
    assert one.reason == "No print: Dynamo cannot print."
    assert one.where == 'model.py:9 in forward: print("hi")'
    assert one.details == SAID.strip()
    assert one.to_json()["line"] == 9


def test_a_reason_that_dynamo_does_not_explain_is_its_first_line() -> None:
    assert Break.of(cause("step\nmore")).reason == "step"
    assert Break.of(cause("")).reason == "no reason given"


def test_a_break_of_no_line() -> None:
    one = Break.of(cause(frames=0))
    assert (one.where, one.line) == ("", 0)
    assert break_list([one]).splitlines()[1:] == ["  1. No print: Dynamo cannot print."]


def test_one_line_in_several_frames_is_one_break() -> None:
    one, other = Break.of(cause()), Break.of(cause("Other"))
    assert distinct([one, None, one, other]) == [one, other]
    assert distinct([None]) == []


def graph(**attributes: object) -> GraphModule:
    gm = symbolic_trace(torch.nn.Identity())
    gm.__dict__.update(attributes)
    return gm


def test_a_graph_that_ends_with_its_function_has_none() -> None:
    ended = GraphCompileReason("return_value", FRAMES, graph_break=False)
    assert break_after(graph(compile_subgraph_reason=ended)) is None
    assert break_after(graph()) is None
    broken = break_after(graph(compile_subgraph_reason=cause()))
    assert broken == Break.of(cause())


def test_breaks_are_listed_in_full(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert break_list([Break.of(cause())]).splitlines() == [
        "graph breaks",
        "  1. No print: Dynamo cannot",
        "     print.",
        '     model.py:9 in forward: print("hi")',
    ]
