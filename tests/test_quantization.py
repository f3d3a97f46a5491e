"""How a projection is quantised: values, text and JSON; and the codes of a weight."""

import json

import pytest
import torch

from amber_compile.errors import OptionError
from amber_compile.quantization import Quantization
from amber_compile.weight_codes import quantize_weight

EXAMPLES = [
    (Quantization(), "int8", {"dtype": "int8"}),
    (Quantization("fp8"), "fp8", {"dtype": "fp8"}),
    (
        Quantization("int8", "outstanding"),
        "int8, outstanding 0.1",
        {"dtype": "int8", "smooth": "outstanding", "alpha": 0.1},
    ),
    (
        Quantization("int8", "smoothquant", 0.75),
        "int8, smoothquant 0.75",
        {"dtype": "int8", "smooth": "smoothquant", "alpha": 0.75},
    ),
]


@pytest.mark.parametrize(("quantization", "text", "data"), EXAMPLES)
def test_text_and_json(quantization, text, data):
    assert str(quantization) == text
    assert quantization.to_json() == data
    assert Quantization.from_json(json.loads(json.dumps(data))) == quantization


def test_the_exponent_is_that_of_the_paper():
    assert Quantization(smooth="smoothquant").alpha == 0.5
    assert Quantization(smooth="outstanding").alpha == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int4"}, "unknown quantize 'int4'; did you mean 'int8'? valid: fp8, int8"),
        ({"smooth": "smooth"}, "unknown smooth 'smooth'"),
        ({"alpha": 0.5}, "alpha=0.5 belongs to a smoothing; smooth is None"),
        ({"smooth": "outstanding", "alpha": 1.5}, "alpha=1.5 must be a number from 0 to 1"),
        ({"smooth": "outstanding", "alpha": True}, "alpha=True must be a number from 0 to 1"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(OptionError) as caught:
        Quantization(**values)
    assert message in str(caught.value)


def test_an_unknown_key_is_named():
    with pytest.raises(OptionError, match="unknown quantisation setting 'bits'"):
        Quantization.from_json({"bits": 8})


# ---- the codes of a weight ----


@pytest.mark.parametrize(("dtype", "half_step"), [("int8", 0.5), ("fp8", 16.0)])
def test_codes_are_within_half_a_step(dtype, half_step):
    """int8 has steps of 1; e4m3 has steps of 32 between 256 and 448."""
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_weight(weight, dtype)
    error = (codes.double() * scale.double()[:, None] - weight).abs()
    assert (error <= scale.double()[:, None] * half_step * (1 + 1e-6)).all()
    assert codes.float().abs().amax(1).eq(127.0 if dtype == "int8" else 448.0).all()


def test_rows_are_quantised_a_slice_at_a_time(monkeypatch):
    weight = torch.randn(10, 16)
    whole = quantize_weight(weight, "int8")
    monkeypatch.setattr("amber_compile.weight_codes.SLICE", 48)
    for one, other in zip(quantize_weight(weight, "int8"), whole, strict=True):
        assert torch.equal(one, other)


def test_a_smooth_vector_divides_the_weight():
    weight, smooth = torch.randn(8, 16), torch.rand(16) + 0.5
    codes, scale = quantize_weight(weight, "int8", smooth)
    for one, other in zip(quantize_weight(weight / smooth, "int8"), (codes, scale), strict=True):
        assert torch.equal(one, other)


def test_a_row_of_zeros_has_codes_0_and_a_scale():
    codes, scale = quantize_weight(torch.zeros(2, 16), "int8")
    assert not codes.any()
    assert (scale == 2.0**-126).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_has_no_codes(value):
    weight = torch.randn(4, 16)
    weight[2, 3] = value
    with pytest.raises(OptionError, match="weight is not finite, first in output 2"):
        quantize_weight(weight, "int8")


@pytest.mark.parametrize("weight", [torch.zeros(4, 16, dtype=torch.int8), torch.zeros(2, 4, 16)])
def test_other_weights_are_refused(weight):
    with pytest.raises(OptionError, match=r"valid: floating point, \[outputs, channels\]"):
        quantize_weight(weight, "int8")
