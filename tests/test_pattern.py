"""N:M patterns: what is one, how it is written and read."""

import pickle

import pytest

from amber_compile import Pattern
from amber_compile.errors import OptionError

ALL = [(n, m) for m in (1, 2, 4, 8, 16, 32) for n in range(1, m + 1)]


@pytest.mark.parametrize(("n", "m"), ALL)
def test_text_and_back(n, m):
    pattern = Pattern(n, m)
    assert str(pattern) == f"{n}:{m}"
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.density == n / m


@pytest.mark.parametrize("text", ["2:4", " 2:4", "2 : 4\n", "02:04"])
def test_spaces_and_zeros_are_forgiven(text):
    assert Pattern.parse(text) == Pattern(2, 4)


def test_a_pattern_is_read_as_itself():
    pattern = Pattern(4, 8)
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "2:", ":4", "2:4:8", "2-4", "2/4", "2.0:4", "-2:4", "+2:4", "two:four", "2:4x"),
        *(None, 2, 0.5, (2, 4), ["2:4"], b"2:4", "9" * 5000 + ":4"),
    ],
)
def test_what_is_no_pattern(text):
    with pytest.raises(OptionError, match=r"pattern=.* is malformed; write it as 'N:M'"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    "text", ["0:4", "5:4", "2:3", "2:6", "3:12", "1:64", "32:64", "0:0", "1:0"]
)
def test_out_of_range(text):
    with pytest.raises(OptionError) as caught:
        Pattern.parse(text)
    assert str(caught.value) == (
        f"pattern={text} is not an N:M pattern; "
        "valid: 1 <= N <= M <= 32 with M a power of two, such as 2:4, 4:8, 8:16"
    )


@pytest.mark.parametrize(("n", "m"), [("2", 4), (2.0, 4), (2, 4.0), (True, 4), (None, 4), (-2, 4)])
def test_numbers_that_are_not_whole(n, m):
    with pytest.raises(OptionError, match="is not an N:M pattern"):
        Pattern(n, m)


def test_a_value():
    assert len({Pattern(2, 4), Pattern.parse("2:4"), Pattern(4, 8)}) == 2
    assert pickle.loads(pickle.dumps(Pattern(2, 4))) == Pattern(2, 4)
    with pytest.raises(AttributeError):
        Pattern(2, 4).n = 3
