"""The ways in which PyTorch lets a model be compiled and called."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from emulate import Settings
from stack import Stack, sparse
from torch import Tensor, nn
from zoo import ZOO

from amber_compile import last_reports
from amber_compile.backend import amber

OPTIONS = {"correction": None}
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
LONG = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


def compiled(model: nn.Module, *, dynamic: bool | None = None, **options: object) -> nn.Module:
    options = OPTIONS | options
    return torch.compile(model, backend="amber_eager", dynamic=dynamic, options=options)


def decisions() -> set[str]:
    return {str(site.decision) for site in last_reports()[-1].sites}


# ---- shapes ----


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_no_length_compiles_a_graph_that_it_would_not_without_amber(
    dynamic: bool | None, fullgraph: bool
) -> None:
    stack = Stack()
    graphs: list[torch.fx.GraphModule] = []

    def count(gm: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    plain = torch.compile(stack, backend=count, dynamic=dynamic, fullgraph=fullgraph)
    for length in (8, 24, 3, 1, 17):
        plain(LONG[:, :length])
    torch._dynamo.reset()
    run = torch.compile(
        stack, backend="amber_eager", dynamic=dynamic, fullgraph=fullgraph, options=OPTIONS
    )
    for length in (8, 24, 3, 17):
        assert torch.equal(run(LONG[:, :length]), sparse(stack, LONG[:, :length]))
    assert torch.equal(run(LONG[:, :1]), stack(LONG[:, :1]))
    assert len(last_reports()) == len(graphs)


@torch.no_grad()
@pytest.mark.parametrize(
    "mark", [torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked]
)
def test_min_tokens_holds_at_run_time_and_puts_no_bound_on_a_marked_dimension(
    mark: Callable[..., None],
) -> None:
    stack = Stack()
    run = compiled(stack, min_tokens=17)
    x, long = X.clone(), LONG.clone()
    for tensor in (x, long):
        if mark is torch._dynamo.mark_dynamic:
            mark(tensor, 1, min=2, max=512)
        else:
            mark(tensor, 1)
    assert torch.equal(run(x), stack(x))
    assert torch.equal(run(long), sparse(stack, long))
    assert len(last_reports()) == 1


@torch.no_grad()
def test_a_fixed_length_below_min_tokens_is_dense_with_the_reason() -> None:
    stack = Stack()
    assert torch.equal(compiled(stack, dynamic=False, min_tokens=17)(X), stack(X))
    assert "dense: 16 tokens are fewer than min_tokens=17" in decisions()


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
def test_tokens_without_a_batch_are_told_from_decode_by_their_number(dynamic: bool) -> None:
    stack = Stack()
    run = compiled(stack, dynamic=dynamic)
    assert torch.equal(run(X[0]), sparse(stack, X[0]))
    assert torch.equal(run(X[0, :1]), stack(X[0, :1]))


@torch.no_grad()
def test_the_first_tokens_of_every_sequence_may_stay_dense() -> None:
    stack = Stack()
    expected = sparse(stack, LONG, settings=Settings(2, 4, dense_prefix=3))
    result = compiled(stack, dynamic=True, dense_prefix=3)(LONG)
    assert torch.equal(result, expected)
    assert torch.equal(result[:, :3], stack(LONG)[:, :3])


@torch.no_grad()
def test_a_graph_that_dynamo_enters_twice_is_reported_once(inductor: None) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(64, 32)

        def forward(self, x: Tensor, limit: float) -> Tensor:
            return self.q_proj(x).clamp(max=limit)

    entered: list[str] = []

    def spy(gm: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        entered.append(gm.code)
        return amber(gm, inputs)

    torch.compile(Clamped(), backend=spy, dynamic=True)(X, 1.5)
    assert len(entered) == 2  # a float becomes an input, which Inductor then wants constant
    assert len(last_reports()) == 1
    assert last_reports()[0].coverage == 1


# ---- modes ----


def test_module_compile_is_the_same() -> None:
    stack = Stack()
    stack.compile(backend="amber_eager", options=OPTIONS)
    with torch.no_grad():
        assert torch.equal(stack(X), sparse(stack, X))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_are_sparse(mode: type[AbstractContextManager[None]]) -> None:
    stack = Stack()
    run = compiled(stack)
    with mode():
        assert torch.equal(run(X), sparse(stack, X))
    with torch.no_grad():
        assert torch.equal(run(X), sparse(stack, X))


class Autocast(nn.Module):
    """A model that casts on its own account."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with autocast():
            return self.model(x)


@torch.no_grad()
def test_autocast_inside_and_outside_are_sparse() -> None:
    stack = Stack()
    with autocast():
        expected = sparse(stack, X)
        assert torch.equal(compiled(stack)(X), expected)
    assert torch.equal(compiled(Autocast(stack))(X), expected)
    assert not torch.equal(expected, sparse(stack, X))


# ---- 4:4 keeps everything ----


@torch.no_grad()
@pytest.mark.parametrize("around", [nullcontext, autocast], ids=["", "autocast"])
@pytest.mark.parametrize("name", ["llama", "llama_bf16", "llama_tied", "gpt2"])
def test_keeping_all_channels_changes_no_bit(
    name: str, around: Callable[[], AbstractContextManager[None]]
) -> None:
    model, inputs = ZOO[name].build()
    run = compiled(model, pattern="4:4", projections=["*"])
    with around():
        assert torch.equal(run(**inputs).logits, model(**inputs).logits)
    assert last_reports()[-1].graphs[0].rewritten > 8


@torch.no_grad()
@pytest.mark.parametrize("correction", ["norm", "variance"])
def test_there_is_nothing_to_correct_where_all_channels_are_kept(correction: str) -> None:
    stack = Stack()
    run = compiled(stack, pattern="4:4", projections=["*"], correction=correction)
    assert torch.equal(run(X), stack(X))
    assert last_reports()[0].graphs[0].rewritten == 6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("casts", [False, True], ids=["", "autocast"])
def test_keeping_all_channels_changes_no_bit_through_inductor(
    dtype: torch.dtype, casts: bool, inductor: None
) -> None:
    stack = Stack().to(dtype)
    model = Autocast(stack) if casts else stack
    dense = torch.compile(model)(LONG.to(dtype))
    torch._dynamo.reset()
    options = {"pattern": "4:4", "projections": ["*"]}
    assert torch.equal(
        torch.compile(model, backend="amber", options=options)(LONG.to(dtype)), dense
    )
    assert last_reports()[0].coverage == 1
