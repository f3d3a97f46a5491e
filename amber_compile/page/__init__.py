"""Write a report as one page: ``Report.to_html(path)``.

    summary       what is sparse, what it saves, what it cost
    heat map      layers x projections: coverage, what is removed, or the error where measured
    sites         every projection once, to be sorted and searched
    graphs        a layer at a time: before beside after, as drawing and as text
    kernels       their source, and the code that Inductor generated

The page needs nothing but itself: a policy in its head forbids the browser any request, and any
script or style but its own, by their hashes. Everything that comes from a model or a user is
escaped by the template. Without scripts it shows all but the graphs.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from amber_compile.memory import readable
from amber_compile.report import Report

from .graphs import graphs_of
from .sites import Row, heat_map, rows_of
from .sources import generated_code, kernel_sources

NO_MORE = "base-uri 'none'; form-action 'none'"
"""The rest of what the page forbids itself."""


def page_of(report: Report, title: str) -> str:
    """Return ``report`` as an HTML document.

    Raises:
        ImportError: without jinja2 or networkx, which PyTorch brings.
    """
    from jinja2 import Environment, StrictUndefined  # not needed to compile
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    style = _data("drawing.css") + _data("page.css")
    script = _data("page.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; {NO_MORE}"
    rows = rows_of(report)
    return environment.from_string(_data("page.html.jinja")).render(
        title=title,
        style=Markup(style),
        script=Markup(script),
        policy=policy,
        report=report,
        facts=_facts(report, rows),
        rows=rows,
        failures=list(dict.fromkeys(graph.fallback for graph in report.graphs if graph.fallback)),
        heat=heat_map(rows),
        formats=any(row.format for row in rows),
        measured=any(row.error is not None for row in rows),
        kernels=kernel_sources(report.sites),
        generated=generated_code(report.graphs),
        data={**graphs_of(report), "sites": [row.to_json() for row in rows]},
    )


def _facts(report: Report, rows: list[Row]) -> list[tuple[str, str, str]]:
    """Return the summary's numbers: number, what it counts, and a remark."""
    sparse = sum(row.pattern != "" for row in rows)
    phases = [graph.phase for graph in report.graphs]
    counts = [f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases)]
    breaks = len(report.breaks)
    seconds = sum(graph.seconds for graph in report.graphs)
    facts = [
        (f"{sparse}", f"of {len(rows)} projections sparse", "the others say why"),
        (f"{report.coverage:.1%}", "of linear MACs covered", "read a sparse activation"),
        (f"{report.removed:.1%}", "of linear MACs removed", "would multiply zeros"),
        (f"{len(phases)}", "graph" + "s" * (len(phases) != 1), ", ".join(counts)),
        (f"{seconds:.2f} s", "to analyse and rewrite", "without compilation"),
    ]
    if report.memory.codes:
        quantized = sum(site.decision.quantization is not None for site in report.sites)
        before, after = readable(report.memory.before), readable(report.memory.after)
        remark = "expected" if report.explained else "codes and what was not released"
        facts[3:3] = [
            (
                f"{quantized}",
                f"of {len(rows)} projections in 8 bits",
                f"{report.quantized:.1%} of MACs",
            ),
            (after, f"of weights, {before} before", remark),
        ]
    if breaks:
        facts.insert(-1, (f"{breaks}", "graph break" + "s" * (breaks != 1), "listed below"))
    errors = [graph.output_error for graph in report.graphs if graph.output_error is not None]
    if report.output:
        _, _, *likelihoods = str(report.output).split(", ")
        remark = ", ".join(["relative", *likelihoods])
        facts.append((f"{report.output.relative:.4f}", "error at the output", remark))
    elif errors:
        facts.append((f"{max(errors):.4f}", "error at the output", "relative, first call"))
    return facts


def _data(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
