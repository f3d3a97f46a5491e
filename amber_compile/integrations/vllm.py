"""vLLM: sparse prefill inside vLLM's own compilation.

    from amber_compile.integrations.vllm import compilation_config
    llm = LLM(model, compilation_config=compilation_config())

vLLM compiles every piece of a model once for each range of token counts, and asks each pass whether
it applies there:

    [1, 1024]        decode, and small mixed batches         ->   as vLLM has them
    [1025, 8192]     prefill, and large mixed batches        ->   rewritten by ``AmberPass``

Left alone: a range that begins below ``min_tokens``, with a warning if it ends above. Pieces that
differ in nothing but their layer are compiled once for all of them, so nothing may be decided by
layer: a plan, and a name pattern that holds a layer's number, are errors.

A batch has one row for each running sequence besides the prompts' rows, so fewer tokens than
sequences can be nothing but decode. ``min_tokens`` is therefore :data:`MIN_TOKENS` unless it is
given: one more than the most sequences that vLLM runs at once by default.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from amber_compile.config import AmberConfig
from amber_compile.errors import OptionError
from amber_compile.naming import PARAMETER
from amber_compile.passes.weight_operand import TRANSPOSES, operation
from amber_compile.projection import value_of

from .inductor import AmberPass

if TYPE_CHECKING:
    InductorPass = CustomGraphPass
else:
    try:
        from vllm.compilation.passes.inductor_pass import InductorPass
    except ImportError:  # to look at the pass, vLLM is not needed
        InductorPass = CustomGraphPass

HOOK = "post_grad_custom_post_pass"
"""Where vLLM takes passes from its users."""

MIN_TOKENS = 1025
"""vLLM's default ``max_num_seqs`` is 1024 on GPUs of 70 GiB and more, less on others."""

LAYER = re.compile(r"(?:^|\.)[\[\]!?*-]*\d[\d\[\]!?*-]*(?=\.|$)")
"""A step of a name pattern that is a number, or matches some numbers and not others."""


class Range(Protocol):
    """A range of token counts as vLLM has it; both ends belong to it."""

    start: int
    end: int


class AmberVllmPass(AmberPass, InductorPass):
    """Rewrites the graphs of large token counts: vLLM's ``post_grad_custom_post_pass``.

    Args:
        config: the options; ``min_tokens=1``, their default, stands for :data:`MIN_TOKENS` here.

    Raises:
        OptionError: for an option that vLLM's pipeline has no place for.
    """

    def __init__(self, config: AmberConfig | None = None) -> None:
        super().__init__(config)
        _check_layers(self.config)
        if self.config.min_tokens == 2:
            raise OptionError(
                "min_tokens=2, and vLLM ends no range at one token; valid: 3 or more, or 1, which "
                f"stands for {MIN_TOKENS} here"
            )
        if self.config.min_tokens == 1:
            self.config = replace(self.config, min_tokens=MIN_TOKENS)

    def __call__(self, graph: Graph) -> None:
        """Rewrite ``graph``, as :class:`AmberPass` does."""
        _mark_weights(graph)
        super().__call__(graph)

    def is_applicable_for_range(self, compile_range: Range) -> bool:
        """Whether every token count of the range is at least ``min_tokens``."""
        least = self.config.min_tokens
        if compile_range.start < least <= compile_range.end:
            warnings.warn(
                f"amber: vLLM's graphs for {compile_range.start} to {compile_range.end} tokens "
                f"stay dense, as some are fewer than min_tokens={least}; say "
                f"compile_ranges_endpoints=[{least - 1}] in compilation_config",
                stacklevel=2,
            )
        return compile_range.start >= least


def compilation_config(config: AmberConfig | None = None) -> dict[str, Any]:
    """Return what ``LLM(..., compilation_config=...)`` takes: the pass, and where ranges part.

    Args:
        config: the options, as of :class:`AmberVllmPass`.

    Raises:
        OptionError: for an option that vLLM's pipeline has no place for.
    """
    amber = AmberVllmPass(config)
    return {
        "inductor_compile_config": {HOOK: amber},
        "compile_ranges_endpoints": [amber.config.min_tokens - 1],
    }


def _mark_weights(graph: Graph) -> None:
    """Mark the inputs that are weights: of fixed size, and read through a transpose.

    vLLM compiles pieces of a graph, of whose inputs AOTAutograd is told nothing.
    """
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or value.dim() != 2:
            continue
        fixed = all(isinstance(size, int) for size in value.shape)
        if fixed and any(operation(user) in TRANSPOSES for user in node.users):
            node.meta.setdefault(PARAMETER, "")


def _check_layers(config: AmberConfig) -> None:
    """Refuse what would tell layers apart."""
    if config.plan is not None:
        raise OptionError(
            "plan= decides by layer, and vLLM compiles layers of one structure once for all; "
            "valid: pattern=, score=, correction=, projections=, skip="
        )
    for option in ("projections", "skip", "quantize_skip"):
        for pattern in getattr(config, option) or ():
            if LAYER.search(pattern):
                raise OptionError(
                    f"{option}={pattern!r} tells layers apart, and vLLM compiles layers of one "
                    "structure once for all; valid: patterns without a layer's number, like "
                    "'*.down_proj'"
                )
