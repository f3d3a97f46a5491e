"""The tokenizer: lossless, made for code; and the windows cut from its tokens."""

from pathlib import Path

import pytest
from python_corpus import Document
from python_tokens import END, tokenize, train_tokenizer, windows
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer

SHIPPED = Path(__file__).parents[2] / "examples" / "python-lm"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn __x__  # tabs\n\n\n    pass\n",
        "carriage\r\nreturns\r\rand\x00\x1f controls \x7f",
        "naïve café, 日本語 🐍👩‍🚀 עברית\u00a0\u2003ﬁ",
        "   leading, trailing   ",
        "1234567890.25e-10 + 0xFF_FF",
        "",
    ],
)
def test_tokens_decode_to_the_very_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("width", [2, 4, 8, 12, 16, 20])
def test_indentation_is_one_token(tokenizer: Tokenizer, width: int) -> None:
    assert len(tokenizer.tokenize("\n" + " " * width + "return")) == 3


def test_documents_are_told_apart_by_the_end_token(tokenizer: Tokenizer) -> None:
    docs = [Document("a", "x = 1\n" * 200), Document("b", "y = 2\n" * 200)]
    tokens = tokenize(docs, tokenizer)
    assert [document[0] for document in tokens] == [tokenizer.eos_token_id] * 2
    cut = windows(tokens, 64)
    assert cut.flatten().tolist() == (tokens[0] + tokens[1])[: cut.numel()]
    assert tokenizer.bos_token == tokenizer.eos_token == END != tokenizer.pad_token


def test_a_tokenizer_learns_from_its_texts() -> None:
    trained = train_tokenizer(["self.assertEqual(a, b)\n"] * 50, vocabulary=300)
    assert "assert" in "".join(token for token in trained.get_vocab() if len(token) > 5)
