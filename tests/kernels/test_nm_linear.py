"""The projection of what ``nm_select`` keeps."""

import pytest
import torch

from amber_compile.errors import OptionError

nm_linear, nm_select = torch.ops.amber.nm_linear, torch.ops.amber.nm_select
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, 64, generator=GENERATOR)
WEIGHT = torch.randn(24, 64, generator=GENERATOR)
BIAS = torch.randn(24, generator=GENERATOR)
FACTOR = torch.rand(64, generator=GENERATOR) + 0.5
ALPHA = torch.rand(24, generator=GENERATOR) + 0.5
BETA = torch.randn(24, generator=GENERATOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("arguments", [(2, 4), (8, 16, "norm", 1), (2, 4, "variance", 0, 99)])
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.transpose(0, 1), lambda t: t[0, 0]])
def test_selects_then_multiplies(assert_same_bits, dtype, bias, arguments, view):
    x, weight = view(X).to(dtype), WEIGHT.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    kept = nm_select(x, FACTOR, *arguments)
    expected = torch.nn.functional.linear(kept, weight, bias)
    assert_same_bits(nm_linear(x, weight, bias, FACTOR, *arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize(("alpha", "beta"), [(ALPHA, None), (None, BETA), (ALPHA, BETA)])
def test_outputs_are_scaled_then_shifted(assert_same_bits, dtype, bias, alpha, beta):
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y = nm_linear(x, weight, bias, FACTOR, 2, 4, "norm", 1)
    wide = y if dtype == torch.float64 else y.float()
    expected = wide * (1 if alpha is None else alpha) + (0 if beta is None else beta)
    actual = nm_linear(x, weight, bias, FACTOR, 2, 4, "norm", 1, 0, alpha, beta)
    assert_same_bits(actual, expected.to(dtype))


def test_selecting_all_is_the_dense_projection(assert_same_bits):
    dense = torch.nn.functional.linear(X, WEIGHT, BIAS)
    assert_same_bits(nm_linear(X, WEIGHT, BIAS, None, 4, 4), dense)
    assert (nm_linear(X, WEIGHT, BIAS, None, 3, 4) != dense).any()


def test_no_tokens(assert_same_bits):
    assert_same_bits(nm_linear(X[:0], WEIGHT, BIAS, None, 2, 4), torch.empty(0, 5, 24))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"weight has shape \[64, 24\]", lambda: nm_linear(X, WEIGHT.T, None, None, 2, 4)),
        (r"weight has shape \[64\]", lambda: nm_linear(X, WEIGHT[0], None, None, 2, 4)),
        (r"bias has shape \[23\]", lambda: nm_linear(X, WEIGHT, BIAS[1:], None, 2, 4)),
        ("weight has dtype .*16", lambda: nm_linear(X, WEIGHT.half(), None, None, 2, 4)),
        ("bias has dtype .*16", lambda: nm_linear(X, WEIGHT, BIAS.half(), None, 2, 4)),
        ("weight is on meta", lambda: nm_linear(X, WEIGHT.to("meta"), None, None, 2, 4)),
        ("pattern='?3:2'?", lambda: nm_linear(X, WEIGHT, None, None, 3, 2)),
        (
            r"output_scale has shape \[23\]; valid: \[24\]",
            lambda: nm_linear(X, WEIGHT, None, None, 2, 4, None, 0, 0, ALPHA[1:]),
        ),
        (
            "output_bias has dtype torch.float16; valid: torch.float32",
            lambda: nm_linear(X, WEIGHT, None, None, 2, 4, None, 0, 0, None, BETA.half()),
        ),
        (
            "output_scale is on meta",
            lambda: nm_linear(X, WEIGHT, None, None, 2, 4, None, 0, 0, ALPHA.to("meta")),
        ),
        ("x is a scalar", lambda: nm_linear(X[0, 0, 0], WEIGHT, None, None, 2, 4)),
    ],
)
def test_bad_arguments_are_named(message, call):
    with pytest.raises(OptionError, match=message):
        call()


def test_opcheck():
    for bias, alpha in ((None, None), (BIAS, ALPHA)):
        arguments = (X, WEIGHT, bias, FACTOR, 2, 4, "norm", 1, 0, alpha, alpha)
        torch.library.opcheck(nm_linear.default, arguments)


def test_a_gradient_is_refused():
    weight = WEIGHT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="amber::nm_linear is for inference only"):
        nm_linear(X, weight, None, None, 2, 4).sum().backward()


@torch.no_grad()
def test_one_graph_serves_all_token_counts():
    torch.compiler.reset()

    def model(x):
        return nm_linear(x, WEIGHT, BIAS, None, 2, 4, None, 0, 8)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    try:
        for tokens in (3, 9, 40):
            x = torch.randn(tokens, 64)
            assert torch.equal(compiled(x), model(x))
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
