"""The pass manager of the vLLM that is installed, as ``vllm_double`` has its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import vllm._custom_ops  # noqa: F401  # registers the operators that vLLM's own passes look for
import vllm_double
from torch.fx import Graph
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import VllmConfig
from vllm.config.utils import Range


class Manager(PostGradPassManager):
    """vLLM's manager with its own passes and ours, as ``VllmBackend`` makes it."""

    def __init__(self, *passes: Any) -> None:
        super().__init__()
        self.configure(VllmConfig())
        for one in passes:
            self.add(one)
        self.range: vllm_double.Range | None = None
        self.graphs: dict[vllm_double.Range, Graph] = {}

    @contextlib.contextmanager
    def compiling(self, compile_range: vllm_double.Range) -> Iterator[None]:
        """Compile for one range."""
        self.range = compile_range
        with pass_context(Range(compile_range.start, compile_range.end)):
            yield
        self.range = None

    def __call__(self, graph: Graph) -> None:
        """Run the passes that apply, and take down what became of the graph."""
        super().__call__(graph)
        assert self.range is not None
        self.graphs[self.range] = copy.deepcopy(graph)
