"""From a user's texts to batches of tokens to calibrate on.

    texts  ->  windows of one length  ->  as many as asked for, drawn from all of them  ->  batches

A text that is much longer than what is asked for is not tokenised whole: excerpts are taken from
evenly spaced places. Every window starts as a text does for the tokenizer (evaluation/text.py).

Refused, with numbers: a text of too few tokens, and one of too many tokens that are unknown to the
tokenizer (a text in another script, or the tokenizer of another model).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from amber_compile.errors import OptionError, whole_number
from amber_compile.evaluation.text import batched, windows

from .errors import CalibrationError

LEAST = 2048
"""Tokens without which a calibration would be chance."""
ADVISED = 32768
"""Tokens below which it says that it would be better with more."""
CHARACTERS = 8
"""A token is seldom longer: so many characters of a text hold the tokens that are needed of it."""
UNKNOWN = (0.01, 0.2)
"""Shares of unknown tokens from which on a text is doubted, and refused."""
PARTS = 8
"""Batches that there should be at least, so that some can be held out."""


def batches_of(
    texts: Sequence[str], tokenizer: Any, *, tokens: int, window: int, batch: int, seed: int = 0
) -> list[Tensor]:
    """Return batches [B, window] of about ``tokens`` tokens, drawn from ``texts``.

    Raises:
        OptionError: for a number that is too small.
        CalibrationError: for a text that is too short, or that the tokenizer does not know.
    """
    whole_number("tokens", tokens, LEAST)
    whole_number("batch", batch, 1)
    wanted = max(2, tokens // whole_number("window", window, 2))
    found = list(_windows(texts, tokenizer, window, wanted))
    held = sum(map(len, found))
    if held < LEAST:
        raise CalibrationError(
            f"the text has {held} tokens; at least {LEAST} are needed, and {ADVISED} advised"
        )
    if held < ADVISED:
        advice = f"{held} tokens of text are few: better with {ADVISED} and more"
        warnings.warn(advice, stacklevel=2)
    _check_known(found, tokenizer)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [found[at] for at in order[:wanted]]
    return list(batched(drawn, max(1, min(batch, len(drawn) // PARTS))))


def _windows(texts: Sequence[str], tokenizer: Any, length: int, wanted: int) -> Iterator[Tensor]:
    """Yield the windows of all texts, or of excerpts of long ones."""
    whole = sum(map(len, texts))
    for text in texts:
        count = -(-wanted * len(text) // max(1, whole))
        size = length * CHARACTERS
        if len(text) <= 2 * count * size:
            yield from _full(windows(text, tokenizer, length) if text else (), length)
        else:
            places = (len(text) * at // count for at in range(count))
            parts = (_excerpt(text, place, size) for place in places)
            yield from chain.from_iterable(
                _full(windows(part, tokenizer, length, 1), length) for part in parts
            )


def _excerpt(text: str, place: int, size: int) -> str:
    """Return about ``size`` characters behind ``place``, from a line's start if one is near."""
    line = text.find("\n", place, place + size) + 1
    start = line or place
    return text[start : start + size]


def _full(found: Iterator[Tensor] | tuple[()], length: int) -> Iterator[Tensor]:
    """Yield the windows that are not cut short; of a text without two tokens there is none."""
    try:
        yield from (window for window in found if len(window) == length)
    except OptionError as cause:
        if "no two tokens" not in str(cause):
            raise


def _check_known(found: Sequence[Tensor], tokenizer: Any) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return
    count = sum(int((window == unknown).sum()) for window in found)
    share = count / sum(map(len, found))
    said = f"{share:.1%} of the text's tokens are unknown to the tokenizer ({count} of them)"
    if share > UNKNOWN[1]:
        raise CalibrationError(
            f"{said}: is it text for this model? valid: {UNKNOWN[1]:.0%} or less"
        )
    if share > UNKNOWN[0]:
        warnings.warn(f"{said}: the plan will fit other text than this model reads", stacklevel=3)
