"""``torch.ops.amber.quantize_rows``: nm_quantize with all channels kept, as PyTorch sees it."""

import pytest
import torch
from row_codes import check
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels.nm_quantize import nm_quantize_reference
from amber_compile.kernels.quantize_rows import quantize_rows_reference

quantize_rows = torch.ops.amber.quantize_rows
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
X = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(0))
SMOOTH = torch.rand(100, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize("operator", [quantize_rows, quantize_rows_reference])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("smooth", [None, SMOOTH])
def test_keeps_all_channels_of_all_tokens(operator, dtype, codes, smooth):
    x = X.to(dtype, copy=True)
    x[0, 0], x[0, 1, 3], x[0, 2, 99], x[0, 3] = 0, float("nan"), float("inf"), 1e-7
    for view in (x, x[0], x[0, 4], x.transpose(0, 1), x[..., ::2], x[:0]):
        s = None if smooth is None else smooth[: view.shape[-1]]
        expected = nm_quantize_reference(view, None, s, 2, 2, codes, "norm")
        check(operator(view, s, codes), expected)


def test_known_numbers():
    codes, scale = quantize_rows(torch.tensor([[254.0, 1.0, -3.0, 0.0], [0.0] * 4]), None)
    assert codes.tolist() == [[127, 0, -2, 0], [0] * 4]  # 0.5 and -1.5 go to the even number
    assert scale.tolist() == [2.0, 2.0**-126]
    codes, scale = quantize_rows(torch.tensor([896.0, 2.0]), torch.tensor([0.5, 4.0]), "fp8")
    assert (codes.float().tolist(), scale.item()) == ([448.0, 8.0], 1.0)


def test_opcheck():
    for x in (X, X.transpose(0, 1).bfloat16(), X[0, 0].half(), X[:0].double()):
        for smooth, dtype in ((None, "int8"), (SMOOTH, "int8"), (SMOOTH, "fp8")):
            torch.library.opcheck(quantize_rows.default, (x, smooth, dtype))


def test_a_meta_tensor_has_shapes():
    codes, scale = quantize_rows(torch.empty(3, 5, 64, device="meta").mT.mT, None, "fp8")
    assert (codes.shape, codes.dtype, codes.device.type) == (
        (3, 5, 64),
        torch.float8_e4m3fn,
        "meta",
    )
    assert (scale.shape, scale.dtype) == ((3, 5), torch.float32)


def test_a_gradient_is_refused():
    _, scale = quantize_rows(X.clone().requires_grad_(), None)
    with pytest.raises(RuntimeError, match="amber::quantize_rows is for inference only"):
        scale.sum().backward()


BAD_ARGUMENTS = {
    "x is a scalar": lambda x, s: quantize_rows(x[0, 0, 0], None),
    "x has 0 channels; valid: at least one": lambda x, s: quantize_rows(x[..., :0], None),
    "x has dtype torch.int32; valid: ": lambda x, s: quantize_rows(x.int(), None),
    r"smooth has shape \[32\]; valid: \[100\]": lambda x, s: quantize_rows(x, s[:32]),
    "smooth has dtype torch.float64; valid: torch.float32": lambda x, s: quantize_rows(
        x, s.double()
    ),
    "smooth is on meta; valid: the device of x": lambda x, s: quantize_rows(x, s.to("meta")),
    "unknown dtype 'int4'; .*valid: fp8, int8": lambda x, s: quantize_rows(x, s, "int4"),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
@pytest.mark.parametrize("traced", [False, True])
def test_bad_arguments_are_named(message, traced):
    x, smooth = X, SMOOTH
    if traced:
        mode = FakeTensorMode()
        x, smooth = mode.from_tensor(x), mode.from_tensor(smooth)
    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](x, smooth)
