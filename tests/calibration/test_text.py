"""Windows are drawn from all of a user's text, and text that will not do is refused."""

from typing import Any

import pytest
import torch

from amber_compile.calibration.errors import CalibrationError
from amber_compile.calibration.text import batches_of


class Letters:
    """A tokenizer of one token a character; capitals are unknown to it."""

    bos_token_id = 1
    unk_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0 if letter.isupper() else 2 + ord(letter) % 97 for letter in text]}


def drawn(texts: list[str], **options: int) -> list[torch.Tensor]:
    return batches_of(texts, Letters(), **{"tokens": 4096, "window": 64, "batch": 4, **options})


@pytest.mark.filterwarnings("ignore:.*tokens of text are few")
def test_windows_come_from_everywhere() -> None:
    letters = "abcdefghijklmnopqrst"
    batches = drawn(["".join(letter * 20000 for letter in letters)])
    assert sum(batch.numel() for batch in batches) == 4096
    assert {tuple(batch.shape) for batch in batches} == {(4, 64)}
    found = torch.cat(batches)
    assert (found[:, 0] == 1).all()  # every window starts as a text does
    seen = {int(token) for token in found[:, 1:].unique()}
    assert seen == {2 + ord(letter) % 97 for letter in letters}


@pytest.mark.filterwarnings("ignore:.*tokens of text are few")
def test_every_text_has_its_share_and_the_seed_draws() -> None:
    texts = ["a" * 30000, "b" * 10000, ""]
    found = torch.cat(drawn(texts, tokens=2048))
    first = (found[:, 1] == 2 + ord("a") % 97).float().mean().item()
    assert 0.5 < first < 0.95
    again = torch.cat(drawn(texts, tokens=2048))
    assert torch.equal(found, again)
    assert not torch.equal(found, torch.cat(drawn(texts, tokens=2048, seed=1)))


def test_a_short_text_is_refused_or_doubted() -> None:
    with pytest.raises(CalibrationError, match="the text has 960 tokens; at least 2048 are needed"):
        drawn(["a" * 1000])
    with pytest.warns(UserWarning, match="4032 tokens of text are few: better with 32768"):
        drawn(["a" * 3970])


@pytest.mark.filterwarnings("ignore:.*tokens of text are few")
def test_text_that_the_tokenizer_does_not_know_is_refused_or_doubted() -> None:
    with pytest.raises(CalibrationError, match=r"49\.\d% of the text's tokens are unknown"):
        drawn(["aA" * 4000])
    with pytest.warns(UserWarning, match=r"of the text's tokens are unknown to the tokenizer"):
        drawn([("a" * 19 + "A") * 400])


def test_enough_text_raises_no_doubt() -> None:
    drawn(["a" * 70000], tokens=40000)
