"""A decision is sparse or dense, and a dense one has its reason."""

import pytest

from amber_compile import Decision, Settings
from amber_compile.decision import blocked, dense, sparse


def test_sparse():
    one = sparse(Settings("2:8", "magnitude"))
    assert (one.sparse, one.reason, one.obstacle, one.density) == (True, None, False, 0.25)
    assert str(one) == "2:8, magnitude"


@pytest.mark.parametrize(("make", "obstacle"), [(dense, False), (blocked, True)])
def test_dense(make, obstacle):
    one = make("rule: k_proj stays dense")
    assert (one.sparse, one.settings, one.obstacle, one.density) == (False, None, obstacle, 1)
    assert str(one) == "dense: rule: k_proj stays dense"


@pytest.mark.parametrize("values", [{}, {"settings": Settings(), "reason": "both"}])
def test_neither_and_both(values):
    with pytest.raises(ValueError, match=r"either sparse \(settings\) or dense \(reason\)"):
        Decision(**values)


def test_a_value():
    assert len({sparse(Settings()), sparse(Settings("2:4")), dense("a"), blocked("a")}) == 3
