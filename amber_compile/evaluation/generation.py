"""What a sparse prefill changes in what is written after it: greedy, decoded dense.

    prompt ── sparse prefill ──►  cache ── dense decode ──►  continuation
    prompt ── dense prefill ──►  cache ── dense decode ──►  continuation

The first token is the prefill's own, the others are the dense model's, from that cache: as
``generate`` of a compiled model does. ``<|endoftext|>`` ends nothing, so that all continuations are
equally long. A greedy text that differs once goes on differently, and may be as good: so the dense
model says how likely it finds either, given the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amber_compile.debug.output_error import number
from amber_compile.errors import OptionError

from .moments import Mean

Model = Callable[..., Any]


@dataclass(frozen=True)
class Generation:
    """Continuations from a sparse and from a dense prefill.

    Attributes:
        prompts: how many.
        prompt_tokens: of each.
        tokens: that were written after each.
        equal: share of tokens that are the same, place by place; ``equal_se`` over prompts.
        identical: share of prompts whose continuations are the same throughout.
        first_difference: tokens before the first different one, the mean over prompts.
        nll_dense: loss of the dense continuation, by the dense model, in nats a token.
        nll_sparse: loss of the sparse-prefilled one, by the dense model; ``nll_se`` is the paired
            error of the difference over prompts.
    """

    prompts: int
    prompt_tokens: int
    tokens: int
    equal: float
    equal_se: float | None
    identical: float
    first_difference: float
    nll_dense: float
    nll_sparse: float
    nll_se: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return {name: number(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        sure = "" if self.equal_se is None else f" ± {self.equal_se:.1%}"
        worse = self.nll_sparse - self.nll_dense
        error = "" if self.nll_se is None else f" ± {self.nll_se:.4f}"
        return (
            f"{self.tokens} tokens written after {self.prompts} prompts of {self.prompt_tokens}: "
            f"{self.equal:.1%}{sure} the same, first difference after {self.first_difference:.1f}, "
            f"{self.identical:.0%} the same throughout; loss by the dense model {worse:+.4f}{error}"
        )


def compare_generation(
    dense: Model, sparse: Model, prompts: Sequence[Tensor], count: int
) -> Generation:
    """Continue ``prompts`` by ``count`` tokens from both prefills.

    Args:
        dense: the model.
        sparse: the same model, sparse.
        prompts: tokens [B, P], all of one length.
        count: tokens to write, at least 1.

    Raises:
        OptionError: if the model keeps no cache.
    """
    equal, losses, delta = Mean(), Mean(), Mean()
    identical = before = 0
    for tokens in prompts:
        expected, actual = (greedy(prefill, dense, tokens, count) for prefill in (dense, sparse))
        same = expected == actual
        identical += int(same.all(1).sum())
        before += int(same.long().cumprod(1).sum())
        written = torch.full((len(tokens),), count)
        equal.add(same.sum(1), written)
        ours, theirs = (_losses(dense, tokens, each) for each in (actual, expected))
        losses.add(theirs, written)
        delta.add(ours - theirs, written)
    number_of = equal.windows
    return Generation(
        prompts=number_of,
        prompt_tokens=prompts[0].shape[1],
        tokens=count,
        equal=equal.mean,
        equal_se=equal.error,
        identical=identical / number_of,
        first_difference=before / number_of,
        nll_dense=losses.mean,
        nll_sparse=losses.mean + delta.mean,
        nll_se=delta.error,
    )


def greedy(prefill: Model, decode: Model, tokens: Tensor, count: int) -> Tensor:
    """Return the likeliest ``count`` tokens behind ``tokens`` [B, P], one after the other.

    Raises:
        OptionError: if the model keeps no cache.
    """
    output = prefill(input_ids=tokens, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise OptionError("generate= needs a model that keeps a cache of keys and values")
    written = [output.logits[:, -1:].argmax(-1)]
    while len(written) < count:
        output = decode(input_ids=written[-1], past_key_values=cache, use_cache=True)
        written.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(written, 1)


def _losses(dense: Model, tokens: Tensor, written: Tensor) -> Tensor:
    """Return the loss of each continuation, summed over its tokens: [B]."""
    logits: Tensor = dense(input_ids=torch.cat([tokens, written], 1)).logits
    told = logits[:, tokens.shape[1] - 1 : -1].float().log_softmax(-1)
    return -told.gather(-1, written[..., None]).double().sum((1, 2)).cpu()
