"""Break-even: exact, and what trying every token count finds."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Add, Integer, Max, Min, Rational, Symbol

from amber_compile.cost.break_even import break_even

T = Symbol("T", positive=True)
SCANNED = 150
"""Token counts that are tried; a later break-even is checked at its edge."""


def scanned(slow, fast) -> int | None:
    """Try every token count up to ``SCANNED``, and one far behind."""
    faster = [(slow - fast).subs(T, count) > 0 for count in (*range(1, SCANNED), 10**9)]
    if not faster[-1]:
        return None
    return next(count for count in range(1, SCANNED + 1) if all(faster[count - 1 :]))


@pytest.mark.parametrize(
    ("slow", "fast", "expected"),
    [
        (2 * T, T + 10, 11),  # equal at 10
        (2 * T, T + Rational(19, 2), 10),
        (T + 10, 2 * T, None),
        (T, T, None),
        (T + 1, T, 1),
        (T, T + 1, None),
        (Max(T, 10), Max(T, 9), None),  # faster below 10 only
        (Max(T, 10), Max(T / 2, 10), 11),
        (Max(2 * T, 10), T + 6, 7),
        (2 * T + Max(0, 20 - 4 * T), T + 10, 11),  # faster at first, slower, faster again
        (T + Max(0, T - 30) + Max(0, 3 - T), T + Max(0, 5 - T), 31),  # equal for a while
        (T + Max(0, 5 - T, T - 5), T, 6),  # touches 0 at 5
        (T + Min(8, T) - 4, T, 5),
        (Max(T, Min(8, 2 * T) + 3), 9, 4),
        (Integer(0), Integer(0), None),
    ],
)
def test_the_first_count_of_all_that_are_faster(slow, fast, expected):
    assert break_even(slow, fast, T) == expected
    assert scanned(slow, fast) == expected


coefficients = st.fractions(0, 4, max_denominator=4)
lines = st.tuples(coefficients, st.integers(0, 12)).map(
    lambda pair: Rational(pair[0]) * T + Rational(pair[1])
)
capped = st.tuples(st.integers(1, 12), lines).map(lambda pair: Min(pair[0], T) + pair[1])
rooflines = st.tuples(lines, st.one_of(lines, capped)).map(lambda pair: Max(*pair))
times = st.lists(st.one_of(lines, rooflines), min_size=1, max_size=3).map(lambda each: Add(*each))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(times, times)
def test_as_a_scan(slow, fast):
    found = break_even(slow, fast, T)
    if found is None or found < SCANNED:
        assert scanned(slow, fast) == found
    else:
        gain = slow - fast
        assert gain.subs(T, found) > 0 >= gain.subs(T, found - 1)


def test_crossings_that_no_scan_reaches():
    tiny = Rational(Fraction(1, 10**15))
    assert break_even((1 + tiny) * T, T + 1, T) == 10**15 + 1
