"""Rates: what comes with the package, what is refused, what is measured."""

import json
from dataclasses import replace

import pytest
import torch

from amber_compile import Pattern
from amber_compile.cost import measure as measuring
from amber_compile.cost.measure import measure_rates
from amber_compile.cost.rates import Rates, machines, rates_of, rates_of_device
from amber_compile.errors import OptionError
from amber_compile.kernels.int8_kernel import int8_kernel

PLAIN = Rates("machine", "a test", {"bfloat16": 1e15}, {"bfloat16": 2e15}, 1e12, 1e-6, 0.5)


@pytest.mark.parametrize("name", machines())
def test_every_machine_says_where_its_numbers_are_from(name):
    rates = rates_of(name)
    assert rates.name == name
    assert "datasheet of the NVIDIA" in rates.source
    assert "estimate: 80 % of its dense and 56 % of its 2:4 peak" in rates.source
    assert 1 < rates.sparse["bfloat16"] / rates.dense["bfloat16"] < 2
    assert rates.dense["float32"] < rates.dense["bfloat16"]
    assert "float32" not in rates.sparse


def test_an_h100_achieves_what_its_source_says():
    rates = rates_of("H100 SXM")
    assert rates.dense["bfloat16"] == pytest.approx(790e12, rel=0.01)
    assert rates.sparse["bfloat16"] == pytest.approx(1100e12, rel=0.01)
    assert rates.bandwidth == pytest.approx(3.0e12, rel=0.01)
    assert (rates.select, rates.overhead) == (0.75, 3e-6)
    assert rates_of("H200").select == 0.6


def test_rates_are_their_own():
    assert rates_of(PLAIN) is PLAIN


def test_an_unknown_machine():
    with pytest.raises(OptionError, match=r"unknown machine 'H10 SXM'; did you mean 'H100 SXM'\?"):
        rates_of("H10 SXM")
    with pytest.raises(OptionError, match=r"valid: A100 SXM, H100 SXM.*others: measure_rates\(\)"):
        rates_of("abacus")


@pytest.mark.parametrize("value", [-1.0, 0, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("what", ["bandwidth", "select"])
def test_a_rate_is_positive(what, value):
    with pytest.raises(OptionError, match=f"{what}={value!r} must be a positive finite number"):
        replace(PLAIN, **{what: value})


@pytest.mark.parametrize("what", ["dense", "sparse"])
def test_so_is_that_of_a_dtype(what):
    with pytest.raises(OptionError, match=rf"{what}\['bfloat16'\]=-1 must be a positive"):
        replace(PLAIN, **{what: {"bfloat16": -1}})
    with pytest.raises(OptionError, match=f"unknown dtype of {what}= 'bfloat8'; did you mean"):
        replace(PLAIN, **{what: {"bfloat8": 1}})


def test_no_overhead_is_one_and_no_dense_rate_is_none():
    assert replace(PLAIN, overhead=0).overhead == 0
    with pytest.raises(OptionError, match="overhead=-1 must be"):
        replace(PLAIN, overhead=-1)
    with pytest.raises(OptionError, match="holds no rate"):
        replace(PLAIN, dense={})


def test_a_sparse_unit_serves_2_4_in_its_dtypes():
    assert PLAIN.has_sparse_unit(Pattern(2, 4), "bfloat16")
    assert not PLAIN.has_sparse_unit(Pattern(2, 4), "float16")
    assert not any(PLAIN.has_sparse_unit(Pattern(n, 2 * n), "bfloat16") for n in (1, 4, 8))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_by_name_or_itself(dtype):
    assert PLAIN.check_dtype(dtype) == "bfloat16"


def test_a_dtype_without_a_rate():
    with pytest.raises(OptionError, match="unknown dtype for machine: 'int8'; valid: bfloat16"):
        PLAIN.check_dtype(torch.int8)


def test_json_and_back():
    text = json.dumps(PLAIN.to_json())
    assert Rates.from_json(json.loads(text)) == PLAIN
    with pytest.raises(OptionError, match="unknown rate 'band'; did you mean 'bandwidth'"):
        Rates.from_json({"band": 1})
    with pytest.raises(OptionError, match="rates lack source, dense"):
        Rates.from_json({"name": "machine"})


# ---- a device ----


def test_no_rates_come_with_the_package_for_a_cpu():
    assert rates_of_device("cpu") is None


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    known = rates_of_device("cuda:0")
    assert (known.name if known else None) == machine


def test_the_machine_at_hand_is_measured(monkeypatch):
    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    rates = measure_rates("cpu")
    codes = {"int8"} if int8_kernel() != "reference" else set()
    assert set(rates.dense) == {"float32", "bfloat16"} | codes
    assert all(1e8 < rate < 1e14 for rate in rates.dense.values())
    assert 1e8 < rates.bandwidth < 1e13
    assert 0 < rates.select < 100
    assert 1e-8 < rates.overhead < 1e-2
    assert rates.sparse == {}
    assert rates.source.startswith("measured 20")
    assert "1 threads" in rates.source
    assert Rates.from_json(json.loads(json.dumps(rates.to_json()))) == rates


def test_a_known_gpu_gets_the_expected_gain_on_what_was_measured(monkeypatch):
    known = replace(
        PLAIN, dense={"bfloat16": 1e15, "int8": 3e15}, sparse={"bfloat16": 2e15, "int8": 4e15}
    )
    monkeypatch.setattr(measuring, "rates_of_device", lambda device: known)
    codes, sparse, words = measuring._expected({"bfloat16": 3e14}, torch.device("cuda"))
    assert codes == pytest.approx({"int8": 9e14})
    assert sparse == pytest.approx({"bfloat16": 6e14, "int8": 12e14})
    assert "8 bits and 2:4 matmul not measured" in words


def test_nothing_is_expected_of_an_unknown_gpu(monkeypatch):
    monkeypatch.setattr(measuring, "rates_of_device", lambda device: None)
    assert measuring._expected({"bfloat16": 3e14}, torch.device("cuda")) == ({}, {}, "")


@pytest.mark.parametrize("name", machines())
def test_eight_bits_are_faster_where_a_datasheet_has_them(name):
    rates = rates_of(name)
    assert "68 % and 49 % in 8 bits" in rates.source
    assert 1.5 < rates.dense["int8"] / rates.dense["bfloat16"] < 3.5
    assert 1.3 < rates.sparse["int8"] / rates.dense["int8"] < 1.6
    assert ("fp8" in rates.dense) == (name != "A100 SXM")
    assert ("fp8" in rates.sparse) == (name in ("H100 SXM", "H200"))


def test_eight_bits_are_no_type_of_activations():
    rates = replace(PLAIN, dense={"bfloat16": 1e15, "int8": 2e15})
    with pytest.raises(OptionError, match="unknown dtype for machine: 'int8'; valid: bfloat16"):
        rates.check_dtype("int8")
