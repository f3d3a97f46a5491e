"""Run a model dense and sparse on the same windows of text, and compare what it says.

    for each batch:   logits of the dense model, once
                      logits of each case, compared at once and dropped

Memory holds the logits of two models for one batch, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from amber_compile.debug.output_error import relative_error
from amber_compile.errors import OptionError, choices, whole_number
from amber_compile.plan import Plan

from .generation import Generation, compare_generation
from .likelihoods import compare
from .progress import bar
from .result import Evaluation, Tally
from .side_by_side import Dense, Sparse, config_of, plain, sides

Batch = Tensor | Mapping[str, Tensor]
KINDS = ("causal", "masked")
LOOKED_AT = 64
"""Tokens that tell whether a model looks ahead."""
LOOKS_AHEAD = 0.05
"""Relative change of the logits before a changed token: rounding, of a causal model."""


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    plan: Plan | str | None = None,
    kind: str | None = None,
    backend: str = "amber_eager",
    generate: int = 0,
    prompts: int = 16,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Return what sparsity costs ``model`` on ``batches``.

    Args:
        model: a causal or a masked language model that returns ``logits``, with its weights.
        batches: tokens [B, S], or keyword inputs with ``input_ids`` and perhaps
            ``attention_mask``: padding is not compared.
        plan: a plan, or the path of one.
        kind: ``"causal"`` or ``"masked"`` (no losses); by default the model is tried.
        backend: ``"amber_eager"``, or ``"amber"`` to run what Inductor generates.
        generate: tokens to write after a sparse and after a dense prefill; 0 for none.
        prompts: windows whose beginnings are the prompts for that.
        progress: show a bar on stderr.
        options: the fields of :class:`AmberConfig`.

    Raises:
        TypeError: if ``model`` is no module.
        OptionError: for an unknown option or value, or batches that hold nothing to compare.
        PlanError: if the plan belongs to another model.
    """
    found = evaluate_cases(
        model,
        batches,
        {"sparse": options if plan is None else {**options, "plan": plan}},
        kind=kind,
        backend=backend,
        generate=generate,
        prompts=prompts,
        progress=progress,
    )
    return found["sparse"]


def evaluate_cases(
    model: nn.Module,
    batches: Iterable[Batch],
    cases: Mapping[str, Mapping[str, Any]],
    *,
    kind: str | None = None,
    backend: str = "amber_eager",
    generate: int = 0,
    prompts: int = 16,
    progress: bool = True,
) -> dict[str, Evaluation]:
    """Return what each of ``cases`` costs, name -> options; the dense model runs once for all.

    Arguments and errors as :func:`evaluate`.
    """
    whole_number("generate", generate, 0), whole_number("prompts", prompts, 1)
    if kind not in (None, *KINDS):
        raise OptionError(choices("kind", kind, KINDS))
    configs = {name: config_of(options) for name, options in cases.items()}
    tallies = {name: Tally() for name in cases}
    total = len(batches) if isinstance(batches, Sized) else None
    first: list[Tensor] = []  # prompts
    with sides(model, configs, backend=backend) as (dense, sparse):
        for inputs in bar(_inputs(plain(model), batches), "windows", progress, total):
            if kind is None:
                kind = kind_of(dense, inputs["input_ids"])
            if generate and sum(map(len, first)) < prompts:
                first.append(inputs["input_ids"][: prompts - sum(map(len, first))])
            _add(tallies, dense, sparse, inputs, kind)
        if not kind or not any(tally.kl.tokens for tally in tallies.values()):
            raise OptionError("batches= holds no window of at least two tokens to compare")
        written = _generations(dense, sparse, first, generate, kind, plain(model), progress)
        return {
            name: tally.result(kind, sparse[name].report, written.get(name))
            for name, tally in tallies.items()
        }


def kind_of(model: Dense, tokens: Tensor) -> str:
    """Return ``masked`` if what is said of a token depends on later ones, else ``causal``."""
    tokens = tokens[:1, :LOOKED_AT]
    half = tokens.shape[1] // 2
    changed = tokens.clone()
    later = tokens[:, half:]
    changed[:, half:] = torch.where(later > 0, later - 1, 1)
    before = [logits_of(model(input_ids=each))[:, :half] for each in (tokens, changed)]
    return "masked" if relative_error(before[:1], before[1:]) > LOOKS_AHEAD else "causal"


def logits_of(output: Any) -> Tensor:
    """Return the logits [B, S, V] that a model returned.

    Raises:
        OptionError: if there are none.
    """
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise OptionError(
            f"the model returns no logits of every token ({type(output).__name__}): not a language "
            "model, or a sentence encoder: evaluate_encoder"
        )
    return found


def _add(
    tallies: Mapping[str, Tally],
    dense: Dense,
    sparse: Mapping[str, Sparse],
    inputs: Mapping[str, Tensor],
    kind: str,
) -> None:
    """Run one batch and add what was found."""
    tokens = inputs["input_ids"]
    live = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
    expected = logits_of(dense(**inputs))
    targets = None
    if kind == "causal":
        targets, live = tokens[:, 1:], live[:, :-1] & live[:, 1:]
        expected = expected[:, :-1]
    for name, tally in tallies.items():
        found = logits_of(sparse[name](**inputs))
        tally.add(compare(expected, found[:, : expected.shape[1]], targets, live))


def _generations(
    dense: Dense,
    sparse: Mapping[str, Sparse],
    windows: list[Tensor],
    count: int,
    kind: str,
    model: nn.Module,
    progress: bool,
) -> dict[str, Generation]:
    """Return the continuations of each case, if any were asked for."""
    if not count:
        return {}
    if kind != "causal":
        raise OptionError("generate= needs a causal language model: this one looks ahead")
    shortest = min(window.shape[1] for window in windows)
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = min(shortest, known - count) if isinstance(known, int) else shortest
    if length < 1:
        raise OptionError(f"generate={count} leaves no room for a prompt: {known} positions")
    prompts = [window[:, :length] for window in windows]
    shown = bar(sparse.items(), "continuations", progress, len(sparse))
    return {name: compare_generation(dense, each, prompts, count) for name, each in shown}


def _inputs(model: nn.Module, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Yield the keyword inputs of each batch, on the model's device.

    Raises:
        OptionError: if one is no batch of tokens, or of tokens that the model does not know.
    """
    device = next((one.device for one in model.parameters()), None)
    for batch in batches:
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        _check(inputs.get("input_ids"), _vocabulary(model))
        yield {name: value.to(device) for name, value in inputs.items()}


def _check(tokens: Any, vocabulary: int | None) -> None:
    whole = isinstance(tokens, Tensor) and tokens.dim() == 2 and not tokens.is_floating_point()
    if not whole or not tokens.shape[1]:
        shape = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise OptionError(f"batches= holds {shape}; valid: whole numbers [batch, tokens]")
    if vocabulary is None or not len(tokens):
        return
    for extreme in (int(tokens.min()), int(tokens.max())):
        if not 0 <= extreme < vocabulary:
            raise OptionError(
                f"batches= holds the token {extreme}, and the model knows 0 to {vocabulary - 1}: "
                "is the text from another tokenizer?"
            )


def _vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens ``model`` knows, if it says so."""
    ask: Callable[[], Any] | None = getattr(model, "get_input_embeddings", None)
    weight = getattr(ask(), "weight", None) if ask else None
    return len(weight) if isinstance(weight, Tensor) else None
