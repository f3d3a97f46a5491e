"""What the cost of a model looks like as text."""

import pytest
from sympy import Max, Min, Rational

from amber_compile import Settings
from amber_compile.cost import cost_of
from amber_compile.cost.kernel import T
from amber_compile.cost.rates import Rates
from amber_compile.cost.table import readable
from amber_compile.decision import dense, sparse
from amber_compile.report import Site

ROUND = Rates("round", "a test", {"bfloat16": 1e15}, {"bfloat16": 2e15}, 4e12, 2e-6, 0.5)


def site(name: str, role: str, n: int, k: int, pattern: str | None = None) -> Site:
    decision = sparse(Settings(pattern)) if pattern else dense("rule")
    share = float(decision.sparse)
    return Site(name, (n, k), n * k, "linear", decision, role=role, share=share)


US = Rational(1, 1_000_000)
SITES = [
    site("0.q", "q", 4096, 4096, "2:4"),
    site("0.k", "k", 1024, 4096),
    site("0.down", "down", 4096, 14336, "4:8"),
    site("lm_head", "head", 32000, 4096),
]


def test_the_table():
    assert str(cost_of(SITES, ROUND)).splitlines() == [
        "Cost on round, bfloat16: sparse is 0.89 times as fast at 2048 tokens, and faster "
        "from no token count on",
        "",
        "Rates: a test.",
        "",
        "projections       count   input   kernels                from T   T=512   T=2048   T=819"
        "2         share",
        "─" * 103,
        "q 4096x4096           1   2:4     compress, 2:4 matmul      434   1.11x    1.37x    1.43"
        "x          21 %",
        "k 1024x4096           1   dense   matmul                                                "
        "            6 %",
        "down 4096x14336       1   4:8     select, matmul          never   0.79x    0.80x    0.80"
        "x          73 %",
        "head 32000x4096       1   dense   matmul                                                "
        "    not counted",
        "",
        "all counted           3                                   never   0.86x    0.89x    0.90"
        "x         100 %",
        "",
        "One down 4096x14336 in µs, of T tokens:",
        "  dense    max(0.117·T, 0.00922·T + 29.4) + 2",
        "  sparse   0.0287·T + max(0.117·T, 0.00922·T + 29.4) + 4",
    ]


def test_the_title_says_when_it_pays_or_that_nothing_is_sparse():
    assert "and faster from 434 tokens on" in str(cost_of(SITES[:1], ROUND))
    text = str(cost_of(SITES[1:2], ROUND))
    assert text.startswith("Cost on round, bfloat16: every projection is dense\n")
    assert "µs" not in text


@pytest.mark.parametrize("sites", [[], SITES[3:]])
def test_nothing_to_count(sites):
    text = str(cost_of(sites, ROUND))
    assert "every projection is dense" in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (US * T, "T"),
        (US * (3 + T / 8), "0.125·T + 3"),
        (US * 123456, "123000"),
        (US * T / 12345, "0.000081·T"),
        (Max(US * T, US * (5 * T + 30)) + 6 * US, "5·T + 36"),
        (Max(US * T / 3, US * (T / 7 + 30)) + 6 * US, "max(0.333·T, 0.143·T + 30) + 6"),
        (32 * Max(US * T, 20 * US), "32·max(20, T)"),
        (Max(US * T / 2, US * Min(T, 128)) + US * T, "T + max(0.5·T, min(128, T))"),
    ],
)
def test_a_readable_time(seconds, text):
    assert readable(seconds) == text
