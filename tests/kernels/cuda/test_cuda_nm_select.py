"""The Triton selection against the reference on the CPU: in Triton's interpreter, and on a GPU."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import interpreted, triton
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.kernels import nm_select as operator
from amber_compile.kernels.cuda import device as cuda_device
from amber_compile.kernels.nm_select import EPSILON, nm_select_reference

pytestmark = pytest.mark.usefixtures("bfloat16_conversions")

tl = triton.language
kernels = interpreted(
    "amber_compile.kernels.cuda.nm_select", "amber_compile.kernels.cuda.channel_groups"
)
module = sys.modules["amber_compile.kernels.nm_select"]  # the operator has the same name

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
SIZES = [2, 4, 8, 16, 32]
INF, NAN = float("inf"), float("nan")
ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, INF, -INF, NAN, 1e-40, -1e-41, 6e-8, 3e38, 65504.0]
ODD_FACTORS = [0.0, 1.0, 1.0, 0.5, 2.0, -2.0, 3.0, 1e-38, 1e30, INF, NAN]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Selection:
    """The kernel, in the interpreter or on a GPU, called with tensors on either device."""

    def __init__(self, device):
        self.device = torch.device(device)

    def __call__(self, x, factor, n, m, *rest, **named):
        if self.device.type == "cpu":
            with np.errstate(all="ignore"):
                return kernels.launch(x, factor, n, m, *rest, **named)
        named = {name: self.place(value) for name, value in named.items()}
        y = operator(self.place(x), self.place(factor), n, m, *rest, **named)
        return y.cpu()

    def place(self, value):
        return value.to(self.device) if isinstance(value, torch.Tensor) else value


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def select(request):
    return Selection(request.param)


def assert_same_bits(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.is_contiguous()
    integer = INTEGERS[actual.dtype.itemsize]
    differ = actual.view(integer) != expected.contiguous().view(integer)
    assert not differ.any(), f"differ at {differ.nonzero()[:5].tolist()}"


def sample(values, shape, dtype, seed):
    """Return a tensor of ``values`` drawn at random; what overflows becomes infinite."""
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.choice(values, shape), dtype=torch.float64).to(dtype)


def ordinary(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(channels, experts=()):
    return torch.rand(*experts, channels, generator=torch.Generator().manual_seed(1)) + 0.5


# ---- which channels are kept ---------------------------------------------------------------------


@settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(SIZES).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    tokens=st.integers(1, 4),
    groups=st.integers(1, 9),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_odd_values(select, dtype, pattern, tokens, groups, weighted, seed):
    n, m = pattern
    x = sample(ODD_VALUES, (tokens, groups * m), dtype, seed)
    factor = sample(ODD_FACTORS, groups * m, torch.float32, seed + 1) if weighted else None
    assert_same_bits(select(x, factor, n, m), nm_select_reference(x, factor, n, m))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", SIZES)
def test_many_ties(select, m, dtype):
    x = sample(range(-3, 4), (24, m), dtype, m)
    for n in {1, 2, 3, m // 2 - 1, m // 2, m // 2 + 1, m - 1} & {*range(1, m)}:
        assert_same_bits(select(x, None, n, m), nm_select_reference(x, None, n, m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize(
    ("tokens", "groups", "weighted"),
    [(1, 1, True), (131, 3, True), (131, 3, False), (7, 261, True), (5, 130, False)],
)
def test_ragged_sizes(select, dtype, n, m, tokens, groups, weighted):
    """More tokens, or more channels, than one program has; blocks and pieces with tails."""
    x = ordinary((tokens, groups * m), dtype)
    factor = weights(groups * m) if weighted else None
    assert_same_bits(select(x, factor, n, m), nm_select_reference(x, factor, n, m))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_value_of_sixteen_bits(select, dtype, n, m, weighted):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    x = every[order].view(dtype).view(64, 1024)
    factor = weights(1024) if weighted else None
    assert_same_bits(select(x, factor, n, m), nm_select_reference(x, factor, n, m))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4)])
def test_nan_payloads_and_signs_rank_alike(select, n, m):
    x = torch.tensor([0x7F800001, -1, 0x7FFFFFFF, 0x7FC00000, 0x7F800000, -1, 1, -1])
    x = x.to(torch.int32).view(torch.float32)
    assert_same_bits(select(x, None, n, m), nm_select_reference(x, None, n, m))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[..., 8:40],
        lambda t: t[..., 1::2][..., :16],
        lambda t: t[:1, :1].expand(4, 3, -1, -1),
        lambda t: t[0, 0, 0, 1:65],
        lambda t: t[0, 0, :, 3:11],
        lambda t: t.transpose(-1, -2)[..., :4],
    ],
    ids=["transposed", "columns", "steps", "expanded", "odd", "rows", "across"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(select, view, dtype):
    x = ordinary((4, 3, 8, 80), dtype)
    y = select(view(select.place(x)), None, 2, 4)
    assert_same_bits(y, nm_select_reference(view(x), None, 2, 4))


# ---- experts, and what is copied -----------------------------------------------------------------


@pytest.mark.parametrize("ends", [[40], [0, 7, 7, 30, 40], [2, 4, 5], [0, 0, 0, 40], [40] * 9])
@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 64), (torch.float32, 520)])
def test_experts(select, ends, dtype, channels):
    x, factor = ordinary((43, channels), dtype), weights(channels, (len(ends),)) ** 4
    offsets = torch.tensor(ends, dtype=torch.int32)
    for n, m in ((2, 4), (3, 8)):
        expected = nm_select_reference(x, factor, n, m, offsets=offsets)
        assert_same_bits(select(x, factor, n, m, offsets=offsets), expected)


def test_experts_are_corrected_as_they_would_be_alone(select):
    x, factor = ordinary((8, 64), torch.bfloat16), weights(64, (3,)) ** 4
    y = select(x, factor, 2, 4, "norm", offsets=torch.tensor([3, 3, 6], dtype=torch.int32))
    alone = [select(x[:3], factor[0], 2, 4, "norm"), select(x[3:], factor[2], 2, 4, "norm")]
    assert_same_bits(y, torch.cat(alone))


@pytest.mark.parametrize("shape", [(2, 6, 64), (2, 2, 3, 64), (12, 64), (64,)])
@pytest.mark.parametrize(
    ("prefix", "correction"), [(1, None), (2, "norm"), (4, None), (99, "norm")]
)
def test_the_first_positions_of_each_sequence_stay_dense(select, shape, prefix, correction):
    x = ordinary(shape, torch.bfloat16)
    y = select(x, None, 2, 4, correction, prefix)
    expected = select(x, None, 2, 4, correction)
    if len(shape) == 1:
        expected = x
    else:
        expected[..., :prefix, :] = x[..., :prefix, :]
    assert_same_bits(y, expected)


# ---- corrections ---------------------------------------------------------------------------------


def exact_and_budget(x, kept, correction):
    """Return the corrected values in float64 and how far rounding may carry them from it.

    In units of u = 2^-24, to first order: a sum of K terms is off by at most K - 1 of its sum of
    magnitudes in any order, and each term by 1 (a square) or 3 (a squared distance); a mean and
    ε add 2. The quotient's root halves the error of both energies, and quotient, root and product
    add 2.5. Rounding the means moves an energy by δ², where δ is at most K + 1 times mean |x|.
    """
    x64, kept64 = x.double(), kept.double()
    variance = correction == "variance"
    energies, relative = [], (x.shape[-1] + 7) * 2.0**-24
    for value in (x64, kept64):
        centre = value.mean(-1, keepdim=True) if variance else 0
        energies.append((value - centre).square().mean(-1, keepdim=True) + EPSILON)
        if variance:
            moved = (x.shape[-1] + 1) * 2.0**-24 * value.abs().mean(-1, keepdim=True)
            relative = relative + moved.square() / energies[-1]
    exact = kept64 * (energies[0] / energies[1]).sqrt()
    rounding = torch.finfo(x.dtype).eps / 2
    return exact, exact.abs() * (relative + rounding) + torch.finfo(
        x.dtype
    ).smallest_normal * rounding


@pytest.mark.parametrize("correction", ["norm", "variance"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n", "m"), [((3, 36), 2, 4), ((2, 1032), 4, 8), ((1, 4112), 8, 16)]
)
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_corrections_stay_within_rounding(select, correction, dtype, shape, n, m, mean):
    x = (ordinary(shape, torch.float32) * 3 + mean).to(dtype)
    for factor in (None, weights(shape[-1])):
        kept = nm_select_reference(x, factor, n, m)
        exact, budget = exact_and_budget(x, kept, correction)
        y = select(x, factor, n, m, correction)
        assert ((y.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("correction", ["norm", "variance"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_corrected(select, correction, dtype):
    """One with an infinity, one with a NaN, one of zeros, and one whose squares vanish."""
    x = ordinary((5, 64), dtype)
    x[0, 17], x[1, 5], x[2], x[3] = INF, NAN, 0, x[3] * 1e-19
    y, kept = select(x, None, 2, 4, correction), nm_select_reference(x, None, 2, 4)
    torch.testing.assert_close(y[:4], kept[:4], rtol=0, atol=0, equal_nan=True)
    assert (y[4] != kept[4]).any()


# ---- dispatch ------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch):
    """The function that PyTorch calls for CUDA tensors, on the CPU; which kernels it launches."""
    launched = []

    def launch(x, *arguments):
        launched.append(arguments)
        return kernels.launch(x, *arguments)

    monkeypatch.setattr("amber_compile.kernels.cuda.nm_select.launch", launch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(module, "kernel_for", lambda x: fake_kernel(x))
    return module._nm_select_cuda, launched


def fake_kernel(x):
    """Name the kernel for a tensor like ``x`` on a CUDA device that need not be there."""
    with FakeTensorMode():
        return KERNEL_FOR(torch.empty(x.shape, dtype=x.dtype, device="cuda"))


KERNEL_FOR = module.kernel_for


def test_cuda_tensors_have_a_kernel_of_their_own():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("amber::nm_select", "CUDA")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_launched(on_cuda, dtype):
    select, launched = on_cuda
    x = ordinary((2, 3, 32), dtype)
    assert_same_bits(select(x, None, 2, 4, None, 1), nm_select_reference(x, None, 2, 4, None, 1))
    assert launched == [(None, 2, 4, None, 1, None)]


@pytest.mark.parametrize(
    ("shape", "arguments"), [((6, 32), (4, 4)), ((6, 32), (2, 4, "norm", 0, 7)), ((0, 32), (2, 4))]
)
def test_what_is_copied_launches_nothing(on_cuda, shape, arguments):
    select, launched = on_cuda
    x = ordinary(shape, torch.bfloat16)
    y = select(x, None, *arguments)
    assert_same_bits(y, x)
    assert y.data_ptr() != x.data_ptr() or not x.numel()
    assert not launched


def test_float64_stays_with_the_reference(on_cuda):
    select, launched = on_cuda
    x = ordinary((6, 32), torch.float64)
    assert_same_bits(select(x, None, 2, 4), nm_select_reference(x, None, 2, 4))
    assert not launched


def test_the_reference_stands_in_for_triton(on_cuda, monkeypatch):
    monkeypatch.setattr(module, "why_no_triton", lambda: "Triton is not installed")
    select, launched = on_cuda
    x = ordinary((6, 32), torch.bfloat16)
    assert_same_bits(select(x, None, 2, 4), nm_select_reference(x, None, 2, 4))
    assert not launched
    assert fake_kernel(x) == "reference"


def test_the_report_names_triton():
    assert cuda_device.why_no_triton() is None
    assert [fake_kernel(torch.empty(4, dtype=dtype)) for dtype in DTYPES] == ["Triton"] * 3
    assert fake_kernel(torch.empty(4, dtype=torch.float64)) == "reference"
    assert set(kernels.DTYPES) == set(module.ENTRIES)
    assert KERNEL_FOR(torch.empty(4, device="meta")) == "reference"


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("correction", [None, "norm", "variance"])
def test_capture_in_a_graph_without_waiting(correction):
    """A graph replayed with other values and other ends answers for those."""
    x = ordinary((64, 256), torch.bfloat16).cuda()
    factor, ends = weights(256, (3,)).cuda(), torch.tensor([9, 30, 64], dtype=torch.int32).cuda()
    operator(x, factor, 2, 4, correction, 2, 0, ends)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            y = operator(x, factor, 2, 4, correction, 2, 0, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x.copy_(ordinary((64, 256), torch.bfloat16, 7))
    ends.copy_(torch.tensor([0, 50, 60], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(y, operator(x, factor, 2, 4, correction, 2, 0, ends))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.zeros((1 << 15) + 3, 1 << 16, dtype=torch.bfloat16, device="cuda")
    x[-4:] = ordinary((4, 1 << 16), torch.bfloat16).cuda()
    for correction in (None, "norm"):
        y = operator(x, None, 2, 4, correction)
        assert_same_bits(y[-4:], operator(x[-4:], None, 2, 4, correction))
        assert not y[:-4].any()
        del y
