"""``torch.ops.amber.nm_quantize`` as PyTorch sees it: arguments, fakes, gradients, compilation."""

import pytest
import torch
from row_codes import check, gaussian, int32, oracle, positive
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels.nm_quantize import nm_quantize_reference
from amber_compile.kernels.nm_select import nm_select_reference

nm_quantize = torch.ops.amber.nm_quantize

# ---- rows that keep all --------------------------------------------------------------------------

X = gaussian(2, 6, 128)
FACTOR = positive(128)


@pytest.mark.parametrize("prefix", [0, 1, 4, 6, 100])
@pytest.mark.parametrize("correction", [None, "norm", "variance"])
def test_the_first_positions_of_each_sequence_stay_dense(quantize, prefix, correction):
    codes, scale = quantize(X, FACTOR, None, 2, 4, correction, prefix)
    whole, sparse = oracle(X, None), quantize(X, FACTOR, None, 2, 4, correction)
    check((codes[:, :prefix], scale[:, :prefix]), (each[:, :prefix] for each in whole))
    check((codes[:, prefix:], scale[:, prefix:]), (each[:, prefix:] for each in sparse))


def test_a_vector_is_one_token_at_position_zero():
    x = X[0, 0]
    sparse, whole = oracle(nm_select_reference(x, None, 2, 4), None), oracle(x, None)
    check(nm_quantize(x, None, None, 2, 4), sparse)
    check(nm_quantize(x, None, None, 2, 4, "int8", None, 1), whole)
    check(nm_quantize(x, None, None, 2, 4, "int8", "norm", 0, 2), whole)


@pytest.mark.parametrize("operator", [nm_quantize, nm_quantize_reference])
def test_few_tokens_stay_dense(operator):
    check(operator(X, None, None, 2, 4, "int8", "norm", 0, 13), oracle(X, None))
    check(
        operator(X, None, None, 2, 4, "int8", None, 0, 12),
        oracle(nm_select_reference(X, None, 2, 4), None),
    )


# ---- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[..., 8:72],
        lambda t: t[..., 1::2],
        lambda t: t[:1, :1].expand(4, 3, -1),
        lambda t: t[0, 0, 1:65],  # an address that no register divides
        lambda t: t[:0],
    ],
    ids=["transposed", "columns", "steps", "expanded", "odd", "none"],
)
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16), (4, 4)])
def test_any_strides(view, pattern):
    x = view(gaussian(4, 3, 128))
    codes, scale = nm_quantize(x, None, None, *pattern)
    assert codes.is_contiguous()
    assert scale.is_contiguous()
    assert (codes.shape, scale.shape) == (x.shape, x.shape[:-1])
    if x.numel():
        kept = nm_select_reference(x.contiguous(), None, *pattern)
        check((codes, scale), oracle(kept, None))


@pytest.mark.parametrize("options", [(), ("int8", "norm", 2), ("fp8", "variance", 0, 50)])
def test_opcheck(options):
    for x in (X, X.transpose(0, 1).half(), X[0, 0].float(), X[:0]):
        arguments = (x, FACTOR, positive(128), 2, 4, *options)
        torch.library.opcheck(nm_quantize.default, arguments)
    arguments = (X[0], FACTOR.repeat(2, 1), None, 2, 4, "int8", None, 0, 0, int32(2, 6))
    torch.library.opcheck(nm_quantize.default, arguments)


@torch.no_grad()
def test_one_graph_serves_all_token_counts():
    def quantized(x):
        codes, scale = nm_quantize(x * 2, FACTOR, None, 2, 4, "int8", "norm", 1, 20)
        return codes, scale * 2

    torch.compiler.reset()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        for shape in ((2, 3), (2, 10), (7, 9)):  # 6 tokens are too few, 20 are not
            x = gaussian(*shape, 128)
            check(compiled(x), quantized(x))
            torch.compiler.set_stance("fail_on_recompile")


def test_a_gradient_is_refused():
    _, scale = nm_quantize(X.clone().requires_grad_(), None, None, 2, 4)
    with pytest.raises(RuntimeError, match="amber::nm_quantize is for inference only"):
        scale.sum().backward()


BAD_ARGUMENTS = {
    "x has 6 channels; valid: a multiple of m=4": lambda x, f: nm_quantize(
        x[..., :6], None, None, 2, 4
    ),
    "x has 0 channels; valid: at least one": lambda x, f: nm_quantize(x[..., :0], None, None, 2, 4),
    "x is a scalar": lambda x, f: nm_quantize(x[0, 0, 0], None, None, 2, 4),
    "x has dtype torch.int32": lambda x, f: nm_quantize(x.int(), None, None, 2, 4),
    r"factor has shape \[32\]; valid: \[128\]": lambda x, f: nm_quantize(x, f[:32], None, 2, 4),
    r"smooth has shape \[32\]; valid: \[128\]": lambda x, f: nm_quantize(x, None, f[:32], 2, 4),
    r"smooth has shape \[1, 128\]; valid: ": lambda x, f: nm_quantize(x, None, f[None], 2, 4),
    "smooth has dtype torch.float64; valid: torch.float32": lambda x, f: nm_quantize(
        x, None, f.double(), 2, 4
    ),
    "smooth is on meta; valid: the device of x": lambda x, f: nm_quantize(
        x, None, f.to("meta"), 2, 4
    ),
    "pattern='?5:4'? is not an N:M pattern": lambda x, f: nm_quantize(x, None, None, 5, 4),
    "unknown dtype 'int4'; .*valid: fp8, int8": lambda x, f: nm_quantize(
        x, None, None, 2, 4, "int4"
    ),
    "unknown correction 'nrom'; did you mean 'norm'": lambda x, f: nm_quantize(
        x, None, None, 2, 4, "int8", "nrom"
    ),
    "dense_prefix=-1 is negative": lambda x, f: nm_quantize(x, None, None, 2, 4, "int8", None, -1),
    "min_tokens=-2 is negative": lambda x, f: nm_quantize(x, None, None, 2, 4, "int8", None, 0, -2),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
@pytest.mark.parametrize("traced", [False, True])
def test_bad_arguments_are_named(message, traced):
    x, factor = X, FACTOR
    if traced:
        mode = FakeTensorMode()
        x, factor = mode.from_tensor(x), mode.from_tensor(factor)
    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](x, factor)
