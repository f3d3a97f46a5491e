"""Inductor with the pass computes what the backend computes, bit for bit."""

import pytest
import torch
from stack import WIDTH, Layer, Stack
from test_calibrated import INT8, plan_of
from torch import nn
from torch._inductor.exc import InductorError
from torch.nn.functional import silu

from amber_compile import AmberConfig, Report, last_reports
from amber_compile.integrations.inductor import AmberPass, inductor_options
from amber_compile.report import clear_reports

PRE, POST = "post_grad_custom_pre_pass", "post_grad_custom_post_pass"
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
LONG = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))


class Fused(nn.Module):
    """A layer whose gate and up projections are one, with biases, behind a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH)
        self.gate_up_proj = nn.Linear(WIDTH, 192)
        self.down_proj = nn.Linear(96, WIDTH)

    def forward(self, x):
        gate, up = self.gate_up_proj(self.norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(silu(gate) * up)


@pytest.fixture(autouse=True)
def quiet(inductor):
    """Let Inductor import what it deprecates."""


def run(model, x, **options):
    """Compile anew; return the answer and the sparse and quantised projections."""
    torch._dynamo.reset()
    clear_reports()
    answer = torch.compile(model, **options)(x)
    sites = Report.merge(last_reports()).sites
    return answer, {one.name: str(one.decision) for one in sites if one.decision.rewritten}


@torch.no_grad()
def assert_equal(model, x, hook=PRE, inductor=None, **options):
    """Compare Inductor with the pass to the backend; the pass runs: nothing is found in a cache."""
    with torch._inductor.config.patch(fx_graph_cache=False):
        passes = inductor_options(AmberConfig(**options), hook=hook) | (inductor or {})
        answer, sites = run(model, x, options=passes)
        own = options | {"inductor": inductor or {}}
        expected, decided = run(model, x, backend="amber", options=own)
    assert sites == decided != {}
    assert torch.equal(answer, expected)
    assert not torch.equal(answer, model(x))
    return answer


@pytest.mark.parametrize("hook", [PRE, POST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_hooks(hook, dtype):
    assert_equal(Stack().to(dtype), X.to(dtype), hook)


@pytest.mark.parametrize("hook", [PRE, POST])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_fused_gates_biases_and_norms(hook, quantize):
    assert_equal(Fused(), X, hook, quantize=quantize)


@pytest.mark.parametrize("hook", [PRE, POST])
def test_int8(hook):
    assert_equal(Stack(), X, hook, quantize="int8")


@pytest.mark.parametrize("hook", [PRE, POST])
@pytest.mark.parametrize("quantization", [None, INT8])
def test_plans_with_tensors(hook, quantization):
    stack = Stack()
    assert_equal(stack, X, hook, plan=plan_of(stack, quantization))


@torch.no_grad()
@pytest.mark.parametrize("hook", [PRE, POST])
def test_symbolic_lengths_and_decode(hook):
    model = Stack()
    own = torch.compile(model, dynamic=True, options={hook: AmberPass()})
    backend = torch.compile(model, dynamic=True, backend="amber")
    for length in (24, 7, 3):
        x = LONG[:, :length]
        assert torch.equal(own(x), backend(x))
        assert not torch.equal(own(x), model(x))
    assert torch.equal(own(LONG[:, :1]), model(LONG[:, :1]))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_go_with_the_pass(mode):
    assert_equal(Layer(), X, inductor=torch._inductor.list_mode_options(mode))


@torch.no_grad()
def test_a_pass_in_each_hook_and_behind_the_backend_changes_nothing_further():
    model = Stack()
    answer = assert_equal(model, X)
    both = {hook: AmberPass() for hook in (PRE, POST)}
    for options in ({"options": both}, {"backend": "amber", "options": {"inductor": both}}):
        again, sites = run(model, X, **options)
        assert torch.equal(again, answer)
        assert len(sites) == 4


@torch.no_grad()
def test_frozen_weights_are_constants_that_nothing_is_derived_from():
    model, options = Stack(), {"options": {PRE: AmberPass()}}
    with torch._inductor.config.patch(fx_graph_cache=False, freezing=True):
        dense, _ = run(model, X)
        with pytest.warns(UserWarning, match="stays dense: freezing=True"):
            frozen, sites = run(model, X, **options)
        assert torch.equal(frozen, dense)
        assert not sites
        strict = {PRE: AmberPass(AmberConfig(strict=True))}
        with pytest.raises(InductorError, match=r"RewriteError: strict=True.*freezing=True"):
            run(model, X, options=strict)
