"""Windows of tokens, from text of any length.

    text  ->  blocks that end with a line  ->  tokens  ->  [start, t, t, ..., t] of one length

Every window starts as a text does for this tokenizer (``<|begin_of_text|>``, ``[CLS]``; the start
token, where there is one and the tokenizer adds none) and ends likewise (``[SEP]``): a model that
was trained so sends its attention there. What is left at the end is dropped, unless it is all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from amber_compile.errors import OptionError, whole_number

BLOCK = 1 << 16
"""Characters that are tokenised at a time."""


def windows(text: str, tokenizer: Any, length: int, count: int | None = None) -> Iterator[Tensor]:
    """Yield at most ``count`` windows of ``length`` tokens, [length] each, in the text's order.

    Raises:
        OptionError: if ``length`` leaves no room for the text's own tokens, or there are none.
    """
    start, end = frame(tokenizer)
    room = whole_number("window", length, 2) - len(start) - len(end)
    if room < 1:
        raise OptionError(f"window={length} has no room beside {len(start) + len(end)} tokens")
    held: list[int] = []
    made = 0
    for block in blocks(text):
        held += _ids(tokenizer, block, False)
        while len(held) >= room and made != count:
            yield torch.tensor([*start, *held[:room], *end])
            del held[:room]
            made += 1
        if made == count:
            return
    if not made:
        if not held or len(start) + len(held) + len(end) < 2:
            raise OptionError("the text has no two tokens")
        yield torch.tensor([*start, *held, *end])


def batched(found: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield windows of one length together, [B, length], the last batch perhaps a smaller one."""
    whole_number("batch", size, 1)
    held: list[Tensor] = []
    for window in found:
        held.append(window)
        if len(held) == size:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)


def blocks(text: str) -> Iterator[str]:
    """Yield the parts of ``text``: each ends behind a line, if one ends in it."""
    at = 0
    while at < len(text):
        end = min(at + BLOCK, len(text))
        line = text.rfind("\n", at, end) + 1 if end < len(text) else 0
        end = line if line > at else end
        yield text[at:end]
        at = end


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that ``tokenizer`` sets before and behind a text."""
    inside, whole = (_ids(tokenizer, "a", special) for special in (False, True))
    for at in range(len(whole) - len(inside) + 1):
        if whole[at : at + len(inside)] == inside:
            start, end = whole[:at], whole[at + len(inside) :]
            break
    else:
        start, end = [], []
    first = getattr(tokenizer, "bos_token_id", None)
    if not start and not end and first is not None:
        start = [first]
    return start, end


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    # verbose: it warns of texts longer than the model reads, and windows are not
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids
