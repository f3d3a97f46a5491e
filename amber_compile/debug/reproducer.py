"""Write a script that rebuilds the graphs of a report with random weights and runs them.

    report.save_reproducer("bug")      ->  bug/reproduce.py, bug/plan.json
    python bug/reproduce.py            ->  versions, report, error per site, any exception; status 1

The script is a module for each graph: its code as Dynamo traced it, its parameters in a tree of
modules under the names that they had, so that the plan finds its sites. Inputs have the shapes,
strides and types that they had; integers are 0 or 1, so that they are valid indices. A symbolic
size is read off an input again. What is written holds no weight, no input, no path and no line of
the model's source. A weight that several sites read becomes one weight for each.

Left out, with the reason in the script: graphs in which nothing was to be sparse, and those that a
script cannot have (traced.py). How the script runs is in reproduction.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import _get_qualified_name

from amber_compile.config import AmberConfig
from amber_compile.errors import AmberError, OptionError, choices
from amber_compile.plan import Plan, PlannedSite
from amber_compile.report import GraphReport, Report
from amber_compile.sketch import SketchNode, renamed
from amber_compile.traced import Input, Traced, TracedSite

KNOWN_MODULES = ("torch", "_operator", "operator", "math", "builtins")
KNOWN_OPERATORS = ("aten", "prims", "prim", "amber", "mkldnn", "quantized", "inductor")
"""The namespaces of ``torch.ops`` that torch and Amber fill."""
BACKENDS = ("amber", "amber_eager")


class ReproducerError(AmberError, ValueError):
    """No graph of a report can be rebuilt by a script."""


def save_reproducer(report: Report, folder: Path, backend: str | None = None) -> None:
    """Write ``reproduce.py`` and ``plan.json`` to ``folder``, which is made if it is missing.

    Raises:
        OptionError: if ``backend`` is none of Amber's.
        ReproducerError: if no graph can be rebuilt, with the reason for each.
    """
    if backend not in (None, *BACKENDS):
        raise OptionError(choices("backend", backend, BACKENDS))
    graphs, left_out = [], []
    for number, graph in enumerate(report.graphs):
        reason = why_left_out(graph)
        if reason is None:
            graphs.append((number, graph))
        else:
            left_out.append(f"graph {number}: {reason}")
    if not graphs:
        raise ReproducerError(
            "no graph of this report can be rebuilt: " + ("; ".join(left_out) or "it has none")
        )
    folder.mkdir(parents=True, exist_ok=True)
    _plan(graph for _, graph in graphs).save(folder / "plan.json")
    (folder / "reproduce.py").write_text(_script(graphs, left_out, backend), encoding="utf-8")


def why_left_out(graph: GraphReport) -> str | None:
    """Return why no script can have ``graph``, or None if one can."""
    kept = graph.traced
    if kept is None or not graph.stages:
        return "nothing in it was to be sparse"
    reasons = [*kept.unable, *_unknown_calls(kept), *_unclear_sites(graph, kept)]
    return "; ".join(reasons) or None


def _unknown_calls(kept: Traced) -> Iterator[str]:
    """Yield a reason for each function that torch and Amber do not have."""
    for target in dict.fromkeys(kept.targets):
        if isinstance(target, str):
            continue
        name = _call(target)
        start, *rest = name.split(".")
        if start not in KNOWN_MODULES and "." in name:
            yield f"it calls {name}, which is not torch's"
        elif name.startswith("torch.ops.") and rest[1] not in KNOWN_OPERATORS:
            yield f"it calls {name}, an operator of another library"


def _unclear_sites(graph: GraphReport, kept: Traced) -> Iterator[str]:
    """Yield a reason for each site whose weight has another site, but is not read directly."""
    reads = {node.name: node.inputs for node in graph.stages[0].sketch}
    for site in _further_sites(kept):
        if site.weight not in reads[site.node]:
            yield f"{site.name} reads another site's weight in a roundabout way"


# ---- the script ----------------------------------------------------------------------------------

HEAD = '''\
"""Graphs that Amber was to make sparse, with random weights: does it go wrong here too?

    python reproduce.py        needs torch and amber_compile; exit status 1 if something fails

Written by Report.save_reproducer with torch {torch}, amber-compile {amber}. plan.json, beside it,
says what is to be sparse.{left_out}
"""

import _operator  # noqa: F401
import math  # noqa: F401
import sys
from pathlib import Path

import torch
from torch import device, inf, nan  # noqa: F401  # as constants of a graph print

from amber_compile.debug.reproduction import Rebuilt, reproduce

BACKEND = "{backend}"  # "amber_eager" generates no code
OPTIONS = {options}{dropped}
DYNAMIC = {dynamic}
TOLERANCE = 0.1  # relative error of generated code against the rewritten graph without
'''

TAIL = """

if __name__ == "__main__":
    plan = Path(__file__).with_name("plan.json")
    sys.exit(reproduce(GRAPHS, plan, BACKEND, OPTIONS, dynamic=DYNAMIC, tolerance=TOLERANCE))
"""


def _script(
    graphs: Sequence[tuple[int, GraphReport]], left_out: Sequence[str], backend: str | None
) -> str:
    """Return the text of ``reproduce.py``."""
    config = next(graph.traced.config for _, graph in graphs if graph.traced) or AmberConfig()
    compiled = any(graph.fallback or graph.code_files for _, graph in graphs)
    options, dropped = _options(config)
    head = HEAD.format(
        torch=torch.__version__,
        amber=Report().to_json()["amber"],
        left_out="".join(f"\n\nLeft out: {reason}" for reason in left_out),
        backend=backend or BACKENDS[not compiled],
        options=repr(options),
        dropped=f"  # left out, being no plain values: {', '.join(dropped)}" if dropped else "",
        dynamic=any(one.kind == "size" for _, graph in graphs for one in _kept(graph).inputs),
    )
    classes = [line for number, graph in graphs for line in _module(number, graph)]
    names = "".join(f"\n    {_rebuilt(number, graph)}," for number, graph in graphs)
    return "\n".join([head, *classes, "", f"GRAPHS = [{names}\n]"]) + TAIL


def _kept(graph: GraphReport) -> Traced:
    assert graph.traced is not None, "why_left_out has looked"
    return graph.traced


def _options(config: AmberConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the options that are plain values, and the names of those that are not."""
    options: dict[str, Any] = {"min_tokens": config.min_tokens, "mode": config.mode}
    plain = {name: value for name, value in config.inductor.items() if _is_plain(value)}
    return {**options, "inductor": plain}, [one for one in config.inductor if one not in plain]


def _is_plain(value: Any) -> bool:
    """Whether ``value`` may be written into a script: no object, and no path of this machine."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return os.sep not in value
    return value is None or isinstance(value, bool | int | float)


def _module(number: int, graph: GraphReport) -> Iterator[str]:
    """Yield the lines of the class of a graph."""
    kept = _kept(graph)
    weights = {name: _access(path) for name, path in _paths(kept).items()}
    given = [one.name for one in kept.inputs if one.kind == "input"]
    yield f"\nclass Graph{number}(torch.nn.Module):"
    if graph.fallback:
        yield f"    # ran dense, because compiling it raised {graph.fallback.partition(':')[0]}"
    yield f"    def forward({', '.join(['self', *given])}):"
    for one in kept.inputs:
        if one.kind == "size":
            yield f"        {one.name} = {_size(one, kept)}"
    further = {one.node: {one.weight: weights[_own_name(one)]} for one in _further_sites(kept)}
    long = dict(kept.long)
    for node, target in zip(graph.stages[0].sketch, kept.targets, strict=True):
        if node.op != "placeholder":
            arguments = long.get(node.name, node.arguments)
            names = weights | further.get(node.name, {})
            yield f"        {_statement(node, target, arguments, names)}"
    yield ""


def _statement(
    node: SketchNode, target: Callable[..., Any] | str, arguments: str, names: Mapping[str, str]
) -> str:
    """Return the line of a node, with other names for the weights that it reads."""
    if node.op == "output":
        return f"return {renamed(arguments, names)}"
    if node.op == "call_method":
        owner, _, rest = arguments.partition(", ")
        return f"{node.name} = {renamed(owner, names)}.{target}({renamed(rest, names)})"
    return f"{node.name} = {_call(target)}({renamed(arguments, names)})"


def _call(target: Any) -> str:
    """Return the text by which a script calls ``target``."""
    return str(_get_qualified_name(target))


def _rebuilt(number: int, graph: GraphReport) -> str:
    """Return the text that makes a graph's module, weights and inputs."""
    kept = _kept(graph)
    paths = _paths(kept)
    held = {one.name: one for one in kept.inputs}
    held |= {_own_name(site): held[site.weight] for site in _further_sites(kept)}
    tensors = [_tensor(paths[name], held[name]) for name in paths]
    inputs = [_tensor(one.name, one) for one in kept.inputs if one.kind == "input"]
    parts = (_tensors("weights", tensors), _tensors("inputs", inputs))
    return f"Rebuilt(\n        Graph{number},\n{''.join(parts)}    )"


def _tensors(name: str, rows: Iterable[str]) -> str:
    lines = "".join(f"            {row},\n" for row in rows)
    return f"        {name}=[\n{lines}        ],\n"


def _tensor(name: str, one: Input) -> str:
    kind = "" if one.kind == "input" else f", {json.dumps(one.kind)}"
    return f"({json.dumps(name)}, {one.shape}, {one.stride}, {one.dtype}, '{one.device}'{kind})"


# ---- names ---------------------------------------------------------------------------------------


def _paths(kept: Traced) -> dict[str, str]:
    """Return where each weight lies: below its site, so that it gives the site its name."""
    paths = {one.name: one.path for one in kept.inputs if one.kind in ("parameter", "buffer")}
    for site in reversed(kept.sites):  # the first site of a weight names it
        paths[site.weight] = f"{site.name}.weight"
    return paths | {_own_name(site): f"{site.name}.weight" for site in _further_sites(kept)}


def _further_sites(kept: Traced) -> list[TracedSite]:
    """Return the sites whose weight has the name of another site before."""
    first: dict[str, str] = {}
    return [site for site in kept.sites if first.setdefault(site.weight, site.name) != site.name]


def _own_name(site: TracedSite) -> str:
    return f"{site.weight}_of_{site.node}"


def _access(path: str) -> str:
    """Return the expression of a path: numbers are names of modules, too."""
    text = "self"
    for step in path.split("."):
        text = f"{text}.{step}" if step.isidentifier() else f"getattr({text}, {step!r})"
    return text


def _size(size: Input, kept: Traced) -> str:
    """Return a symbolic size as a script reads it off an input, or as a number."""
    for one in kept.inputs:
        if size.symbols[0] in one.symbols and one.kind == "input":
            return f"{one.name}.size({one.symbols.index(size.symbols[0])})"
    return str(size.shape[0])


def _plan(graphs: Iterable[GraphReport]) -> Plan:
    """Return what was to be sparse, whether or not that compiled."""
    sites: dict[str, PlannedSite] = {}
    for graph in graphs:
        for site in _kept(graph).sites:
            held = sites.get(site.name)
            if held is None or isinstance(held.choice, str):
                sites[site.name] = PlannedSite(site.shape, site.choice)
    return Plan(sites)
