"""The cost model of quantised projections, against arithmetic by hand."""

from dataclasses import replace

import pytest
from sympy import Rational, simplify

from amber_compile import Settings
from amber_compile.cost import cost_of
from amber_compile.cost.kernel import T
from amber_compile.cost.rates import Rates
from amber_compile.decision import Decision, dense
from amber_compile.quantization import Quantization
from amber_compile.report import Site

ROUND = Rates(
    name="round",
    source="a test",
    dense={"bfloat16": 1e15, "int8": 2e15},
    sparse={"bfloat16": 16e14, "int8": 3e15},
    bandwidth=4e12,
    overhead=2e-6,
    select=0.5,
)
NO_UNIT = replace(ROUND, sparse={})
N, K = 14336, 4096
INT8, FP8 = Quantization("int8"), Quantization("fp8")
SPARSE = Decision(settings=Settings("2:4"), quantization=INT8)
DENSE = Decision(reason="rule", quantization=INT8)


def site(decision: Decision, **changes) -> Site:
    made = Site("layers.0.gate", (N, K), N * K, "linear", decision, "gate", float(decision.sparse))
    return replace(made, **changes)


def names(cost) -> list[str]:
    return [kernel.name for kernel, _ in cost.sparse.kernels]


def test_codes_and_a_product_in_eight_bits():
    cost = cost_of([site(DENSE)], ROUND)
    (quantize, _), (matmul, _) = cost.sparse.kernels
    assert names(cost) == ["quantize", "int8 matmul"]
    assert quantize.traffic == {"activations in": 2 * K * T, "codes": K * T}
    assert matmul.traffic == {
        "activations in": K * T,
        "weight": N * K,
        "activations out": 2 * N * T,
    }
    assert (quantize.macs, matmul.macs) == (0, N * K * T)
    seconds = quantize.seconds.subs(T, 8192), matmul.seconds.subs(T, 8192)
    assert float(seconds[0]) == pytest.approx(2e-6 + 8192 * K * 3 / (0.5 * 4e12))
    assert float(seconds[1]) == pytest.approx(2e-6 + 2 * 8192 * N * K / 2e15)
    plain = cost_of([site(dense("rule"))], ROUND)
    assert simplify(cost.dense.seconds - plain.dense.seconds) == 0
    assert 1.5 < cost.speedup(8192) < 2


def test_codes_of_what_a_sparse_unit_takes():
    cost = cost_of([site(SPARSE)], ROUND)
    (compress, _), (matmul, _) = cost.sparse.kernels
    assert names(cost) == ["compress", "2:4 int8 matmul"]
    assert compress.traffic == {
        "activations in": 2 * K * T,
        "values": Rational(K, 2) * T,
        "metadata": Rational(K, 8) * T,
    }
    assert matmul.traffic["weight"] == N * K
    assert matmul.traffic["activations out"] == 2 * N * T
    assert float(matmul.seconds.subs(T, 8192)) == pytest.approx(2e-6 + 2 * 8192 * N * K / 3e15)


def test_where_no_sparse_unit_serves_one_pass_selects_and_quantises():
    cost = cost_of([site(SPARSE)], NO_UNIT)
    assert names(cost) == ["quantize", "int8 matmul"]
    assert cost.sparse.macs == cost.dense.macs


def test_a_half_that_is_sparse_and_one_that_is_not():
    cost = cost_of([site(SPARSE, share=0.5)], ROUND)
    assert names(cost) == ["compress", "2:4 int8 matmul", "quantize", "int8 matmul"]


def test_a_format_without_a_rate_runs_at_that_of_the_activations_and_says_so():
    fp8 = cost_of([site(Decision(reason="rule", quantization=FP8))], ROUND)
    assert names(fp8) == ["quantize", "fp8 matmul at the rate of bfloat16"]
    at = fp8.sparse.at(8192)["seconds"]
    quantize = fp8.sparse.kernels[0][0].seconds.subs(T, 8192)
    assert at == pytest.approx(float(quantize) + 2e-6 + 2 * 8192 * N * K / 1e15)


def test_quantised_or_not_are_two_groups():
    cost = cost_of([site(DENSE), site(dense("rule"), name="layers.1.gate")], ROUND)
    assert [group.changed for group in cost.groups] == [True, False]
    assert [group.to_json()["format"] for group in cost.groups] == ["int8", None]
    text = str(cost)
    assert "quantize, int8 matmul" in text
    assert "sparse is" in text.splitlines()[0]
    assert "int8" not in str(cost_of([site(dense("rule"))], ROUND))
