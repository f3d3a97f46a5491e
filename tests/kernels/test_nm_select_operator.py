"""``torch.ops.amber.nm_select`` as PyTorch sees it: arguments, fakes, gradients, compilation."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels.nm_select import nm_select_reference

nm_select = torch.ops.amber.nm_select
X = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
FACTOR = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5

# ---- arguments -----------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "x has 6 channels; valid: a multiple of m=4": lambda x, f: nm_select(x[..., :6], None, 2, 4),
    "x is a scalar": lambda x, f: nm_select(x[0, 0, 0], None, 2, 4),
    "x has dtype torch.int32; valid: torch.float32, ": lambda x, f: nm_select(x.int(), None, 2, 4),
    "x has dtype torch.float8_e4m3fn; valid: ": lambda x, f: nm_select(
        x.to(torch.float8_e4m3fn), None, 2, 4
    ),
    r"factor has shape \[32\]; valid: \[64\]": lambda x, f: nm_select(x, f[:32], 2, 4),
    r"factor has shape \[1, 64\]; valid: \[64\]": lambda x, f: nm_select(x, f[None], 2, 4),
    "factor has dtype torch.float64; valid: torch.float32": lambda x, f: nm_select(
        x, f.double(), 2, 4
    ),
    "factor is on meta; valid: the device of x": lambda x, f: nm_select(x, f.to("meta"), 2, 4),
    "pattern='?5:4'? is not an N:M pattern": lambda x, f: nm_select(x, None, 5, 4),
    "pattern='?0:4'?": lambda x, f: nm_select(x, None, 0, 4),
    "pattern='?2:6'?": lambda x, f: nm_select(x, None, 2, 6),
    "pattern='?2:64'?": lambda x, f: nm_select(x, None, 2, 64),
    "unknown correction 'nrom'; did you mean 'norm'": lambda x, f: nm_select(x, f, 2, 4, "nrom"),
    "dense_prefix=-1 is negative": lambda x, f: nm_select(x, f, 2, 4, None, -1),
    "min_tokens=-2 is negative": lambda x, f: nm_select(x, f, 2, 4, None, 0, -2),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message):
    with pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](X, FACTOR)


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named_while_tracing(message):
    with FakeTensorMode() as mode, pytest.raises(OptionError, match=message):
        BAD_ARGUMENTS[message](mode.from_tensor(X), mode.from_tensor(FACTOR))


# ---- what is copied ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 4, 6, 100])
@pytest.mark.parametrize("correction", [None, "norm"])
def test_the_first_positions_of_each_sequence_stay_dense(assert_same_bits, prefix, correction):
    y = nm_select(X, FACTOR, 2, 4, correction, prefix)
    assert_same_bits(y[:, :prefix], X[:, :prefix])
    assert_same_bits(y[:, prefix:], nm_select(X, FACTOR, 2, 4, correction)[:, prefix:])
    assert_same_bits(nm_select_reference(X, FACTOR, 2, 4, None, prefix)[:, :prefix], X[:, :prefix])


def test_a_vector_is_one_token_at_position_zero(assert_same_bits):
    x = X[0, 0]
    assert_same_bits(nm_select(x, None, 2, 4, None, 1), x)
    assert_same_bits(nm_select(x, None, 2, 4, None, 0), nm_select(X, None, 2, 4)[0, 0])
    assert_same_bits(nm_select(x, None, 2, 4, None, 0, 2), x)
    assert_same_bits(nm_select_reference(x, None, 2, 4, None, 1), x)


@pytest.mark.parametrize("select", [nm_select, nm_select_reference])
def test_few_tokens_stay_dense(assert_same_bits, select):
    assert_same_bits(select(X, None, 2, 4, "norm", 0, 13), X)
    assert_same_bits(select(X, None, 2, 4, "norm", 0, 12), select(X, None, 2, 4, "norm"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_selecting_all_changes_no_bit(assert_same_bits, dtype):
    x = X.to(dtype, copy=True)
    x[0, 0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-7])
    for select in (nm_select, nm_select_reference):
        assert_same_bits(select(x, FACTOR, 4, 4), x)


@pytest.mark.parametrize("arguments", [(2, 4), (4, 4), (2, 4, None, 6), (2, 4, None, 0, 99)])
def test_the_result_never_shares_memory(arguments):
    x = X.clone()
    nm_select(x, None, *arguments).fill_(7)
    assert torch.equal(x, X)


# ---- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("norm",), ("variance", 2), (None, 0, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(arguments, dtype):
    for x in (X.to(dtype), X.to(dtype).transpose(0, 1), X[0, 0].to(dtype), X[:0].to(dtype)):
        torch.library.opcheck(nm_select.default, (x, FACTOR, 2, 4, *arguments))


def test_a_meta_tensor_has_a_shape():
    y = nm_select(torch.empty(3, 5, 64, device="meta", dtype=torch.half).mT.mT, None, 2, 4)
    assert (y.shape, y.dtype, y.device.type) == ((3, 5, 64), torch.half, "meta")


def test_a_gradient_is_refused_and_a_forward_is_not(assert_same_bits):
    x = X.clone().requires_grad_()
    y = nm_select(x, None, 2, 4)
    assert_same_bits(y.detach(), nm_select(X, None, 2, 4))
    with pytest.raises(RuntimeError, match="amber::nm_select is for inference only"):
        y.sum().backward()
    with torch.inference_mode():
        assert_same_bits(nm_select(x, None, 2, 4), y.detach())


def pruned(x):
    return nm_select(x * 2, FACTOR, 2, 4, "norm", 1, 20) + 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_one_graph_serves_all_token_counts(assert_same_bits, backend):
    torch.compiler.reset()
    compiled = torch.compile(pruned, backend=backend, fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        for shape in ((2, 3), (2, 10), (7, 9), (50, 31)):  # 6 tokens are too few, 20 are not
            x = torch.randn(*shape, 64)
            assert_same_bits(compiled(x), pruned(x))
            torch.compiler.set_stance("fail_on_recompile")


@torch.no_grad()
def test_static_compilation(assert_same_bits):
    torch.compiler.reset()
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True, dynamic=False)
    for x in (X, X.transpose(0, 1), X.bfloat16()):
        assert_same_bits(compiled(x), pruned(x))


def available_memory() -> int:
    """Return how many bytes programs may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(assert_same_bits):
    needed = 10 << 30
    if available_memory() < needed:
        pytest.skip(f"waits for {needed >> 30} GiB of free memory")
    x = torch.zeros((1 << 15) + 3, 1 << 16, dtype=torch.bfloat16)
    x[-4:] = torch.randn(4, 1 << 16)
    y = nm_select(x, None, 2, 4)
    assert_same_bits(y[-4:], nm_select(x[-4:], None, 2, 4))
    assert not y[:-4].view(torch.int64).any()
