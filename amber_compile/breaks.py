"""Graph breaks: where Dynamo ended a graph and ran Python, and why, in its own words.

    Failed to trace builtin operator: Dynamo does not know how to trace builtin operator `print` ...
      model.py:9 in forward: print("hi")

Everything here is read from the reasons that Dynamo records (``GraphCompileReason``); no message is
interpreted. A break in code that several frames run is one break.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Dynamo is not needed to look at a report
    from torch._dynamo.output_graph import GraphCompileReason
    from torch.fx import GraphModule


@dataclass(frozen=True, slots=True)
class Break:
    """One place at which Dynamo ends a graph.

    Attributes:
        reason: why, in a line.
        file: of the user's code.
        line: in that file.
        function: that the line belongs to.
        code: the line itself.
        details: all that Dynamo says of it, hints and links among it.
    """

    reason: str
    file: str = ""
    line: int = 0
    function: str = ""
    code: str = ""
    details: str = ""

    @property
    def where(self) -> str:
        """The user's line, as a debugger would print it; empty if Dynamo names none."""
        place = f"{self.file}:{self.line} in {self.function}" if self.file else ""
        return f"{place}: {self.code}" if self.code else place

    def to_json(self) -> dict[str, Any]:
        """Return the break as plain JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, cause: GraphCompileReason) -> Break:
        """Read what Dynamo recorded."""
        said = cause.reason.strip()
        explained = re.search(r"^\s*Explanation: (.*)$", said, re.MULTILINE)
        headline = said.splitlines()[0] if said else "no reason given"
        reason = f"{headline}: {explained[1]}" if explained else headline
        if not cause.user_stack:
            return cls(reason, details=said)
        frame = cause.user_stack[-1]
        return cls(reason, frame.filename, frame.lineno or 0, frame.name, frame.line or "", said)


def break_after(gm: GraphModule) -> Break | None:
    """Return the break that ended the graph, or None: it ended with its function."""
    cause = getattr(gm, "compile_subgraph_reason", None)
    return Break.of(cause) if cause is not None and cause.graph_break else None


def distinct(breaks: Iterable[Break | None]) -> list[Break]:
    """Return each break once: the same line for the same reason is one, in whatever frame."""
    found: dict[tuple[str, int, str], Break] = {}
    for one in breaks:
        if one is not None:
            found.setdefault((one.file, one.line, one.reason), one)
    return list(found.values())
