"""Sources of the kernels that a report names, and the code that Inductor generated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from amber_compile.report import GraphReport, Site

MOST, BUDGET = 150_000, 450_000
"""Characters of generated code that a page holds for one graph, and for all: layers repeat."""

CPU_UNITS = ("C++", "VNNI", "AMX")
"""What the names of compiled CPU kernels hold."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read: its name, its text ("" if there is none) and a remark."""

    name: str
    text: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as the report names it, how many sites run it, and its sources."""

    name: str
    sites: int
    sources: list[Source]


def kernel_sources(sites: Sequence[Site]) -> list[Kernel]:
    """Return every kernel of ``sites`` with its sources, the most used first."""
    counts = Counter(site.kernel for site in sites if site.kernel)
    return [Kernel(name, count, _sources(name)) for name, count in counts.most_common()]


def _sources(kernel: str) -> list[Source]:
    """Return the files of a kernel's operators: an operator and its files have one name."""
    found, words = [], dict.fromkeys(re.findall(r"[a-z]\w+", kernel))
    compiled = any(unit in kernel for unit in CPU_UNITS)
    if compiled and "quantize" in kernel:
        words = dict.fromkeys(("nm_quantize", "int8_gemm"))
    for word in words:
        places = [f"cpu/{word}.cpp"] if compiled else [f"cuda/{word}.py", f"{word}.py"]
        for place in places:
            source = resources.files("amber_compile.kernels").joinpath(place)
            if source.is_file():
                found.append(Source(f"kernels/{place}", source.read_text("utf-8")))
                break
    return found


def generated_code(graphs: Sequence[GraphReport]) -> list[Source]:
    """Return the code that Inductor generated for each graph, or why there is none."""
    found: list[Source] = []
    for at, graph in enumerate(graphs, start=1):
        room = BUDGET - sum(len(source.text) for source in found)
        found += _generated(f"graph {at}, {graph.phase}", graph.code_files, min(MOST, room))
    return found


def _generated(graph: str, files: Sequence[str], most: int) -> list[Source]:
    if not files:
        return [
            Source(graph, "", "not recorded: Inductor generated nothing, or is not the compiler")
        ]
    found = []
    for at, file in enumerate(files, start=1):
        name = graph if len(files) == 1 else f"{graph}, part {at}"
        try:
            text = Path(file).read_text("utf-8")
        except OSError:
            found.append(Source(name, "", "not recorded: its file is gone from Inductor's cache"))
            continue
        cut = f"the first {most:,} of {len(text):,} characters" if len(text) > most else ""
        cut = cut if most else f"{len(text):,} characters, left out to keep the page small"
        found.append(Source(name, text[:most], cut))
        most -= len(found[-1].text)
    return found
