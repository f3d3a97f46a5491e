"""Error messages: what was wrong, what it was, what would be right."""

import numpy as np
import pytest

from amber_compile import errors
from amber_compile.errors import AmberError, OptionError, choices, whole_number

SCORES = ("weight_norm", "magnitude", "robust_norm")


def test_valid_values_are_listed_in_order():
    assert choices("score", "entropy", SCORES) == (
        "unknown score 'entropy'; valid: magnitude, robust_norm, weight_norm"
    )


def test_the_closest_is_suggested():
    assert choices("score", "wieght_norm", SCORES) == (
        "unknown score 'wieght_norm'; did you mean 'weight_norm'? "
        "valid: magnitude, robust_norm, weight_norm"
    )


@pytest.mark.parametrize("value", [None, 3, ["magnitude"], object, float("nan")])
def test_any_value_can_be_wrong(value):
    assert choices("score", value, SCORES).startswith(f"unknown score {value!r};")


def test_none_can_be_valid():
    assert choices("part", "up", (None, "gate")) == "unknown part 'up'; valid: None, gate"


def test_of_many_values_only_the_closest_are_listed():
    many = [f"option_{number}" for number in range(400)]
    message = choices("entry", "option_39x", many)
    assert message.startswith("unknown entry 'option_39x'; did you mean 'option_39")
    assert "none of the 400 valid ones; close to it: option_39" in message
    assert len(message) < 200
    assert choices("entry", "zzz", many) == "unknown entry 'zzz'; none of the 400 valid ones"


@pytest.mark.parametrize("value", [1, 7, np.int64(7), np.int32(7), np.uint8(7), 2**40])
def test_whole_numbers(value):
    assert whole_number("min_tokens", value, 1) == int(value)
    assert type(whole_number("min_tokens", value, 1)) is int


@pytest.mark.parametrize("value", [0, -1, np.int64(0), 1.0, "1", None, True, [1], np.float32(2)])
def test_what_is_no_whole_number(value):
    with pytest.raises(OptionError) as caught:
        whole_number("min_tokens", value, 1)
    assert str(caught.value) == f"min_tokens={value!r} must be a whole number >= 1"


@pytest.mark.parametrize("name", ["OptionError", "PlanError", "RewriteError", "VerifyError"])
def test_one_base_class_catches_them_all(name):
    assert issubclass(getattr(errors, name), AmberError)


def test_what_a_caller_without_amber_would_expect():
    assert issubclass(OptionError, ValueError)
    assert issubclass(errors.PlanError, ValueError)
    assert issubclass(errors.RewriteError, RuntimeError)
    assert issubclass(errors.VerifyError, AssertionError)
