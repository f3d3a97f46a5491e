"""Amber in PyTorch's own logs and traces.

    TORCH_LOGS="amber"            INFO: a line for each compiled graph
    TORCH_LOGS="+amber"           DEBUG: its table and its graphs as well
    TORCH_LOGS="amber_graphs"     the graph as Dynamo traced it, and as it was rewritten
    TORCH_LOGS="amber_sites"      the table: each projection, and why it is sparse or dense
    TORCH_TRACE=folder            the same for ``tlparse``, beside PyTorch's files of each graph:
                                  amber_graph_before, amber_graph_after, amber_report (JSON)

From Python: ``torch._logging.set_logs(modules={"amber": logging.INFO, "amber_graphs": True})``.

PyTorch must know such names before it reads ``TORCH_LOGS`` (torch_logs). PyTorch 2.11 learns them
too late, and no version does under ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``: there the logger has its
module's name only, ``TORCH_LOGS="+amber_compile"``.

What nobody asked for is not made: no text of a graph, no JSON.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from torch._logging import _internal

from .torch_logs import LOGGER, register_logs

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from .report import GraphReport

register_logs()
log = logging.getLogger(LOGGER)
graphs_log = _internal.getArtifactLogger(LOGGER, "amber_graphs")
sites_log = _internal.getArtifactLogger(LOGGER, "amber_sites")


def trace_graph(when: str, gm: GraphModule) -> None:
    """Log ``gm``, the graph ``"before"`` or ``"after"`` rewriting, where that is asked for."""
    if graphs_log.isEnabledFor(logging.DEBUG):
        graphs_log.debug("graph %s:\n%s", when, _text(gm))
    _internal.trace_structured(
        "artifact",
        lambda: {"name": f"amber_graph_{when}", "encoding": "string"},
        payload_fn=lambda: _text(gm),
        expect_trace_id=False,
    )


def trace_report(graph: GraphReport) -> None:
    """Log what became of a graph: a line, and the rest where it is asked for."""
    from .report import Report

    report = Report([graph])
    log.info("%s", report.summary())
    if sites_log.isEnabledFor(logging.DEBUG):
        sites_log.debug("%s", report)
    _internal.trace_structured(
        "artifact",
        lambda: {"name": "amber_report", "encoding": "json"},
        payload_fn=lambda: json.dumps({**graph.to_json(), "stages": []}, indent=1),
        expect_trace_id=False,
    )


def _text(gm: GraphModule) -> str:
    return gm.print_readable(print_output=False)
