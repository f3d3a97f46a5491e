"""Projections on a GPU: streams, CUDA graphs, no waiting for the device, and whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_problems import BF16, FP16, KINDS, Problem, amber
from torch import Tensor

from amber_compile.kernels.nm_linear import nm_linear_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned", "sparse_from_one_token")]

TOKENS, OUTPUTS, CHANNELS = 1024, 512, 1024
A_MOMENT = 50_000_000  # cycles that a stream is kept busy


@pytest.fixture
def operands(device) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, a weight and a factor of a product large enough to be sparse."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(TOKENS, CHANNELS, device=device, generator=generator, dtype=BF16)
    weight = torch.randn(OUTPUTS, CHANNELS, device=device, generator=generator, dtype=BF16)
    return x, weight, torch.rand(CHANNELS, device=device, generator=generator) + 0.5


def compress_multiply(quantize: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return compress + multiply as one call, quantised or not."""

    def solve(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        values, metadata, scale = amber.nm_compress(x, factor, quantize, "norm")
        weight = (weight * 20).to(values.dtype) if quantize else weight
        y: Tensor = amber.nm_matmul(values, metadata, weight, None, scale)
        return y

    return solve


def linear(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    y: Tensor = amber.nm_linear(x, weight, None, factor, 2, 4, "norm")
    return y


CALLS = {
    "nm_linear": linear,
    "bf16": compress_multiply(None),
    "int8": compress_multiply("int8"),
    "fp8": compress_multiply("fp8"),
    "select": lambda x, weight, factor: amber.nm_select(x, factor, 8, 16, "variance"),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, operands) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One of the calls, compiled and tested on the device already."""
    CALLS[request.param](*operands)
    torch.cuda.synchronize()
    return CALLS[request.param]


# ---- numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("correction", [None, "norm", "variance"])
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16)])
@pytest.mark.parametrize("tokens", [1, 77, 1024])
def test_linear_is_the_reference(device, dtype, bias, correction, pattern, tokens):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, 512, generator=generator).to(dtype)
    weight = torch.randn(264, 512, generator=generator).to(dtype)
    shift = torch.randn(264, generator=generator).to(dtype) if bias else None
    factor = torch.rand(512, generator=generator) + 0.5
    moved = [None if t is None else t.to(device) for t in (x, weight, shift, factor)]
    y = amber.nm_linear(*moved, *pattern, correction)
    kept = amber.nm_select(x, factor, *pattern, None)
    kept64 = kept.double() * scale64(x, kept, correction)
    exact = torch.nn.functional.linear(
        kept64, weight.double(), None if shift is None else shift.double()
    )
    low = nm_linear_reference(*moved, *pattern, correction).cpu().double()
    worst, rounding = (low - exact).abs().max(), torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((y.cpu().double() - exact).abs() <= 2 * worst + rounding).all()


def scale64(x: Tensor, kept: Tensor, correction: str | None) -> Tensor:
    """Return the correction of each token in fp64."""
    if correction is None:
        return torch.ones(*x.shape[:-1], 1, dtype=torch.float64)
    energies = [
        t.double().var(-1, correction=0, keepdim=True)
        if correction == "variance"
        else t.double().square().mean(-1, keepdim=True)
        for t in (x, kept)
    ]
    return (energies[0] / energies[1]).sqrt()


# ---- execution -----------------------------------------------------------------------------------


def test_a_captured_graph_answers_as_eager_does(call, operands, assert_same_bits):
    x, weight, factor = operands
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(static, weight, factor)
    for seed in range(3):
        fresh = torch.randn_like(x) * (seed + 1)
        static.copy_(fresh)
        y.view(torch.uint8).fill_(255)
        graph.replay()
        assert_same_bits(y, call(fresh, weight, factor))


def test_work_is_ordered_by_the_current_stream(call, operands, assert_same_bits):
    x, weight, factor = operands
    expected = call(2 * x, weight, factor)
    late = torch.full_like(x, float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_MOMENT)
        late.copy_(2 * x)
        y = call(late, weight, factor)  # reads NaN if it does not wait for the stream
    side.synchronize()
    assert_same_bits(y, expected)


def test_two_streams_do_not_disturb_each_other(call, operands, assert_same_bits):
    x, weight, factor = operands
    inputs = [x, torch.randn_like(x)]
    expected = [call(one, weight, factor) for one in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, one, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(one, weight, factor))
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected, strict=True):
        for result in results:
            assert_same_bits(result, wanted)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Make waiting for the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_waits_for_the_device(call, operands, no_waiting):
    call(*operands)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_wait_is_not_waited_for(device, kind):
    problem = Problem.random(0, kind, 256, 256, 512, device)
    problem.solve()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(20 * A_MOMENT)
    problem.solve()
    done.record()
    assert not done.query()  # the host is here before the device is
    torch.cuda.synchronize()
