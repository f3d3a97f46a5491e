"""Windows of tokens: all of the text, in order, each framed as the tokenizer frames a text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from amber_compile.errors import OptionError
from amber_compile.evaluation import text as module
from amber_compile.evaluation.text import batched, blocks, frame, windows

SHIPPED = Path(__file__).parents[2] / "examples" / "python-lm"
TEXT = "def f(x):\n    return x\n" * 40


class Letters:
    """A tokenizer: a token for each character, between ``start`` and ``end``."""

    def __init__(self, start: list[int] = (), end: list[int] = (), bos: int | None = None) -> None:
        self.start, self.end, self.bos_token_id = list(start), list(end), bos

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*self.start, *ids, *self.end] if add_special_tokens else ids}


def letters(found: Any) -> str:
    return "".join(chr(token) for window in found for token in window)


@pytest.mark.parametrize("block", [7, 64, 1 << 16])
def test_windows_hold_the_text_without_what_is_left(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    assert "".join(blocks(TEXT)) == TEXT
    found = list(windows(TEXT, Letters(), 16))
    assert {len(window) for window in found} == {16}
    assert len(found) == len(TEXT) // 16
    assert letters(found) == TEXT[: len(found) * 16]


def test_a_block_ends_behind_a_line(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 30)
    assert all(block.endswith("\n") for block in blocks(TEXT))
    assert list(blocks("x" * 70)) == ["x" * 30, "x" * 30, "x" * 10]


def test_as_many_as_are_asked_for():
    found = list(windows(TEXT, Letters(), 16, 3))
    assert letters(found) == TEXT[:48]


@pytest.mark.parametrize(
    ("tokenizer", "start", "end"),
    [
        (Letters(), [], []),
        (Letters([1]), [1], []),
        (Letters([1], [2]), [1], [2]),
        (Letters(bos=5), [5], []),  # there is one, and the tokenizer does not add it
        (Letters([1], bos=5), [1], []),
    ],
)
def test_each_window_is_framed_as_a_text_is(tokenizer, start, end):
    assert frame(tokenizer) == (start, end)
    found = list(windows(TEXT, tokenizer, 10))
    room = 10 - len(start) - len(end)
    for at, window in enumerate(found):
        middle = [ord(letter) for letter in TEXT[at * room : (at + 1) * room]]
        assert window.tolist() == [*start, *middle, *end]


def test_a_text_shorter_than_a_window_is_one():
    assert letters(windows("ab", Letters(), 16)) == "ab"
    assert letters(windows("a", Letters([1]), 16)) == "\x01a"


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_two_tokens_is_an_error(text):
    with pytest.raises(OptionError, match="the text has no two tokens"):
        list(windows(text, Letters(), 16))


def test_a_window_without_room_is_an_error():
    with pytest.raises(OptionError, match="window=2 has no room beside 2 tokens"):
        list(windows(TEXT, Letters([1], [2]), 2))
    with pytest.raises(OptionError, match="window=1 must be a whole number >= 2"):
        list(windows(TEXT, Letters(), 1))


def test_windows_of_one_length_go_together():
    found = [*batched(windows(TEXT, Letters(), 16, 5), 2)]
    assert [batch.shape for batch in found] == [(2, 16), (2, 16), (1, 16)]
    assert letters(torch.cat(found)) == TEXT[:80]


def test_the_shipped_tokenizer(recwarn):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    found = list(windows(TEXT * 20, tokenizer, 64, 4))
    assert tokenizer.decode(torch.cat([window[1:] for window in found])) in TEXT * 20
    assert {int(window[0]) for window in found} == {tokenizer.bos_token_id}
    assert not recwarn.list
