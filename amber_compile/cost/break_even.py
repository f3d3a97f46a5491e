"""Find from which token count on one time is shorter than another, exactly.

Times are sums, maxima and minima of linear functions of T: continuous, and straight between kinks.

    gain = slow - fast      kinks  where two arguments of a Max or Min are equal
                            roots  where a straight piece of the gain is 0

Between two neighbouring marks (kinks and roots) the gain has one sign, so one look at each piece
tells everything: no token count is tried. Numbers are rational throughout: equal times are equal.
"""

from __future__ import annotations

from itertools import combinations, pairwise

from sympy import Expr, Max, Min, Rational, Symbol, ceiling


def break_even(slow: Expr, fast: Expr, symbol: Symbol) -> int | None:
    """Return the least whole T >= 1 with ``fast`` < ``slow`` there and for every larger T.

    Both are piecewise linear in ``symbol`` with rational coefficients. None if there is no such T.
    """
    gain = slow - fast
    marks = sorted({Rational(0), *_kinks(gain, symbol), *_roots(gain, symbol)})
    if _at(gain, symbol, marks[-1] + 1) <= 0:
        return None
    for left, right in reversed(list(pairwise(marks))):
        if right.is_integer and _at(gain, symbol, right) <= 0:
            return int(right) + 1
        last = int(ceiling(right)) - 1  # whole number of the piece between the two
        if last > left and _at(gain, symbol, (left + right) / 2) <= 0:
            return last + 1
    return 1


def _kinks(expression: Expr, symbol: Symbol) -> set[Rational]:
    """Return every T > 0 where the slope may change."""
    found: set[Rational] = set()
    for node in expression.atoms(Max, Min):
        for one, other in combinations(node.args, 2):
            found |= _roots(one - other, symbol)
    return found


def _roots(expression: Expr, symbol: Symbol) -> set[Rational]:
    """Return every T > 0 where a straight piece that is not flat is 0."""
    marks = sorted({Rational(0), *_kinks(expression, symbol)})
    values = [_at(expression, symbol, mark) for mark in marks]
    found: set[Rational] = set()
    for at, left in enumerate(marks):
        last = at + 1 == len(marks)
        right = left + 1 if last else marks[at + 1]
        after = _at(expression, symbol, right) if last else values[at + 1]
        slope = (after - values[at]) / (right - left)
        root = left - values[at] / slope if slope else left
        if slope and root > 0 and left <= root and (last or root <= right):
            found.add(root)
    return found


def _at(expression: Expr, symbol: Symbol, tokens: Rational) -> Rational:
    return expression.subs(symbol, tokens)
