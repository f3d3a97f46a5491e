"""A small Llama, compiled on a GPU with ``backend="amber"``, beside the same model on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import unsettle

import amber_compile
from amber_compile.kernels.cuda.device import why_no_sparse_product

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("inductor", "sparse_from_one_token")]

TOKENS, VOCABULARY = 512, 128
EVERYWHERE = {"projections": ["*.layers.*"]}


@cache
def model() -> LlamaForCausalLM:
    """Return the model in fp32 on the CPU; bf16 copies of it hold the same values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    made = LlamaForCausalLM(config).eval()
    unsettle(made)
    return made.bfloat16().float()


def on(device: torch.device | str) -> nn.Module:
    """Return a copy in bf16 on a device."""
    return copy.deepcopy(model()).bfloat16().to(device)


@cache
def prompt() -> Tensor:
    return torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def logits(module: Callable[..., object], tokens: Tensor) -> Tensor:
    """Run a prompt; return its logits on the CPU, in fp64."""
    with torch.no_grad():
        found: Tensor = module(tokens).logits  # type: ignore[attr-defined]  # of transformers
    return found.cpu().double()


@cache
def _expected(options: tuple[tuple[str, object], ...]) -> tuple[Tensor, Tensor]:
    arguments = {"backend": "amber_eager", "options": dict(options)}
    found = []
    for module in (model(), on("cpu")):
        torch.compiler.reset()
        found.append(logits(torch.compile(module, **arguments), prompt()))
    return found[0], found[1]


def expected(**options: object) -> tuple[Tensor, Tensor]:
    """Return the sparse model's logits on the CPU: in fp32, and in bf16, which is independent."""
    given = options or EVERYWHERE
    return _expected(tuple((name, _frozen(value)) for name, value in given.items()))


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def assert_near(actual: Tensor) -> None:
    """Compare in the Frobenius norm: twice the error of bf16 on the CPU.

    A selection has no continuous outcome: two scores that are nearly equal change places by
    rounding, on the CPU as on the GPU. So both have errors of the same kind, and single logits say
    little.
    """
    exact, low = expected()
    assert (actual - exact).norm() <= 2 * (low - exact).norm()


@pytest.mark.parametrize("backend", ["amber", "amber_eager"])
def test_prefill_is_that_of_the_cpu(device, backend):
    compiled = torch.compile(on(device), backend=backend, options=EVERYWHERE)
    assert_near(logits(compiled, prompt().to(device)))
    report = amber_compile.last_reports()[-1]
    assert report.coverage > 0.9
    if why_no_sparse_product(device, "bf16") is None:
        assert all("nm_linear" in site.kernel for site in report.sites if site.decision.sparse)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("backend", ["amber", "amber_eager"])
def test_quantised_prefill_is_that_of_the_cpu(device, backend, quantize):
    """One sparse projection: were all sparse, choices between near scores would hide the codes."""
    options = {"quantize": quantize, "projections": ["*.0.mlp.down_proj"]}
    exact, low = expected(**options)
    assert 2 * (low - exact).norm() < exact.norm() / 2  # else the next line proves nothing
    compiled = torch.compile(on(device), backend=backend, options=options)
    actual = logits(compiled, prompt().to(device))
    assert (actual - exact).norm() <= 2 * (low - exact).norm()


def test_dense_and_sparse_differ(device):
    exact, low = expected()
    dense = logits(on(device), prompt().to(device))
    assert (dense - exact).norm() > 2 * (low - exact).norm()  # else the test above proves nothing


def test_reduce_overhead_replays_what_it_recorded(device):
    options = {**EVERYWHERE, "mode": "reduce-overhead"}
    compiled = torch.compile(on(device), backend="amber", options=options)
    found = []
    for _ in range(4):  # warm up, record, replay, replay
        torch.compiler.cudagraph_mark_step_begin()
        found.append(logits(compiled, prompt().to(device)))
    assert_near(found[0])
    for replayed in found[2:]:
        assert torch.equal(replayed, found[1])


def test_one_token_stays_dense(device):
    module, token = on(device), prompt()[:, :1].to(device)
    compiled = torch.compile(module, backend="amber", options=EVERYWHERE)
    dense = torch.compile(module, backend="inductor")
    assert torch.equal(logits(compiled, token), logits(dense, token))
