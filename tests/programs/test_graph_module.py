"""Rewritten graphs of Dynamo, make_fx and symbolic_trace: what follows from weights stays true."""

import copy
import pickle

import pytest
import torch
from programs_of import OPTIONS, Biased, X, compiled, plan_of
from stack import WIDTH, Stack, sparse
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.functional import linear

from amber_compile import AmberConfig, Report, last_reports, refresh, register_model, rewrite
from amber_compile.errors import OptionError

EVERYTHING = {"projections": "*", "quantize": "int8"}


def traced(model: nn.Module, x: torch.Tensor = X, **options: object) -> tuple[GraphModule, Report]:
    """Return the rewritten module of ``symbolic_trace``, and its report."""
    return rewrite(symbolic_trace(model), AmberConfig(**options), example_inputs=(x,))


def derives(gm: GraphModule) -> int:
    return sum(node.target is torch.ops.amber.derive.default for node in gm.graph.nodes)


class Twice(nn.Module):
    """One linear called twice, and its parameters read as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.q_proj(input=self.q_proj(x))
        return linear(y, self.q_proj.weight)


# ---- symbolic_trace ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model", [Stack, Biased, Twice])
@torch.no_grad()
def test_a_traced_module_answers_like_the_backend(model, options):
    module = model()
    gm, report = traced(module, **options)
    assert report.graphs[0].rewritten
    for tokens in (8, 33):
        x = torch.randn(2, tokens, WIDTH)
        assert torch.equal(gm(x), compiled(module, x, options))


@torch.no_grad()
def test_it_computes_what_the_settings_say():
    stack = Stack()
    assert torch.equal(traced(stack, correction=None)[0](X), sparse(stack, X))


@pytest.mark.parametrize("smooth", [False, True])
@torch.no_grad()
def test_every_tensor_of_a_plan(smooth):
    stack = Stack()
    plan = plan_of(stack, smooth=smooth)
    gm, _ = traced(stack, plan=plan, strict=True)
    assert torch.equal(gm(X), compiled(stack, X, {"plan": plan}))


@torch.no_grad()
def test_smooth_vectors_are_folded_into_attributes():
    class Scaled(Biased):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

        def forward(self, x):
            gate, up = self.gate_up_proj(x * self.scale).chunk(2, -1)
            return self.down_proj(nn.functional.silu(gate) * up)

    model = Scaled()
    options = {"plan": plan_of(model, "dense"), "fold_smooth": True}
    gm, report = traced(model, **options)
    assert torch.equal(gm(X), compiled(model, X, options))
    places = [site.smoothing for site in report.sites]
    assert places == [site.smoothing for site in last_reports()[-1].sites]
    assert places[0] == "folded into scale"


def test_the_given_module_stays_as_it_is():
    given = symbolic_trace(Stack())
    text, names = str(given.graph), list(given.state_dict())
    meta = [dict(node.meta) for node in given.graph.nodes]
    gm, _ = rewrite(given, example_inputs=(X,))
    assert (str(given.graph), list(given.state_dict())) == (text, names)
    assert [node.meta for node in given.graph.nodes] == meta
    assert list(gm.state_dict()) == names
    assert all(gm.get_parameter(name) is one for name, one in given.named_parameters())


def test_parameters_keep_their_names_and_sites_are_named_by_them():
    gm, report = traced(Biased())
    assert gm.state_dict().keys() == Biased().state_dict().keys()
    assert [site.name for site in report.sites] == ["gate_up_proj", "down_proj"]
    assert isinstance(gm, GraphModule)


@torch.no_grad()
def test_a_linear_called_twice_is_derived_once():
    gm, report = traced(Twice(), **EVERYTHING)
    assert report.graphs[0].rewritten == 3
    assert derives(gm) == 3  # a factor, codes and scales
    assert [site.name for site in report.sites] == ["q_proj"]


@torch.no_grad()
def test_tied_weights():
    stack = Stack()
    stack.layers[1].down_proj.weight = stack.layers[0].down_proj.weight
    gm, _ = traced(stack, quantize="int8")
    assert torch.equal(gm(X), compiled(stack, X, {"quantize": "int8"}))
    assert gm.state_dict().keys() == stack.state_dict().keys()


@torch.no_grad()
def test_the_names_of_a_registered_model_are_used():
    stack = Stack()
    register_model(stack)
    _, report = traced(stack.layers[1], skip="layers.1.down_proj")
    names = ["layers.1.gate_proj", "layers.1.up_proj", "layers.1.down_proj"]
    assert [site.name for site in report.sites] == names
    assert [site.decision.sparse for site in report.sites] == [True, False, False]


@torch.no_grad()
def test_one_token_stays_dense():
    stack = Stack()
    gm, report = traced(stack, X[:1])
    assert report.graphs[0].phase == "unknown"
    assert torch.equal(gm(X[:1, :1]), stack(X[:1, :1]))
    assert torch.equal(gm(X[:1, :2]), compiled(stack, X[:1, :2], {}))


# ---- modules that stay modules -------------------------------------------------------------------


class Subclass(nn.Linear):
    """A linear that may do anything."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(module: nn.Linear) -> nn.Linear:
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def prehooked(module: nn.Linear) -> nn.Linear:
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return module


def patched(module: nn.Linear) -> nn.Linear:
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)
    return module


@pytest.mark.parametrize(
    "other",
    [
        lambda: hooked(nn.Linear(WIDTH, WIDTH)),
        lambda: prehooked(nn.Linear(WIDTH, WIDTH)),
        lambda: patched(nn.Linear(WIDTH, WIDTH)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    ],
)
@torch.no_grad()
def test_what_is_more_than_a_linear_is_called_as_before(other):
    model = nn.Sequential()
    model.add_module("q_proj", other())
    model.add_module("k_proj", nn.Linear(WIDTH, WIDTH))
    gm, report = traced(model, projections="k_proj", pattern="4:4")
    assert torch.equal(gm(X), model(X))
    (outside,) = [one for one in report.outside if one.name == "q_proj"]
    assert "it is called as a module" in str(outside.decision.reason)
    assert [site.name for site in report.sites] == ["k_proj", "q_proj"]


@torch.no_grad()
def test_linears_inside_leaf_modules_are_listed():
    class Leafs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.q_proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.attention(self.q_proj(x), x, x)[0]

    model = Leafs().eval()
    gm, report = traced(model, pattern="4:4")
    assert torch.equal(gm(X), model(X))
    (outside,) = report.outside
    assert outside.name == "attention.out_proj"
    assert "(MultiheadAttention)" in str(outside.decision.reason)


# ---- example inputs ------------------------------------------------------------------------------


def test_a_module_without_shapes_needs_inputs():
    with pytest.raises(OptionError, match="does not record its shapes; valid: values for x, such"):
        rewrite(symbolic_trace(Stack()))


@torch.no_grad()
def test_a_module_that_records_shapes_needs_none():
    gm, mode = symbolic_trace(Stack()), FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(mode.from_tensor(X))
    done, report = rewrite(gm)
    assert report.graphs[0].rewritten == 4
    assert torch.equal(done(X), compiled(Stack(), X, {}))


@pytest.mark.parametrize("given", [(), (X, X)])
def test_there_must_be_one_for_each(given):
    with pytest.raises(OptionError, match=f"has {len(given)} values; valid: 1, one for each .*: x"):
        rewrite(symbolic_trace(Stack()), example_inputs=given)


@torch.no_grad()
def test_defaults_may_be_left_out():
    class Scaled(Stack):
        def forward(self, x, scale=2):
            return super().forward(x) * scale

    given = symbolic_trace(Scaled())
    for inputs in ((X,), (X, 2)):
        gm, _ = rewrite(given, example_inputs=inputs)
        assert torch.equal(gm(X), compiled(Scaled(), X, {}))
        assert torch.equal(gm(X, 4), 2 * gm(X))


def test_they_must_fit():
    with pytest.raises(OptionError, match="example_inputs do not fit the program, whose inputs"):
        rewrite(symbolic_trace(Stack()), example_inputs=(torch.randn(2, 8, 48),))


@torch.no_grad()
def test_a_rewritten_module_needs_none_and_stays_as_it_is():
    for options in ({}, EVERYTHING):
        gm, _ = traced(Biased(), **options)
        again, report = rewrite(gm, AmberConfig(**options, strict=True))
        assert str(again.graph) == str(gm.graph)
        assert report.graphs[0].rewritten == 0
        assert torch.equal(again(X), gm(X))


# ---- weights that change -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, EVERYTHING])
@torch.no_grad()
def test_changed_weights_are_noticed(options):
    stack = Stack()
    gm, _ = traced(stack, **options)
    answers = [gm(X)]

    def check() -> None:
        answers.append(gm(X))
        assert not torch.equal(*answers[-2:])
        assert torch.equal(answers[-1], compiled(stack, X, options))

    weight = stack.layers[0].down_proj.weight
    weight.mul_(torch.rand_like(weight))
    check()
    stack.load_state_dict(Stack(seed=1).state_dict())
    check()
    weight.data.mul_(torch.rand_like(weight))  # behind PyTorch's back
    refresh(stack)
    check()
    refresh(gm)
    assert torch.equal(gm(X), answers[-1])


@torch.no_grad()
def test_a_weight_that_is_not_finite():
    stack = Stack()
    gm, _ = traced(stack)
    stack.layers[0].down_proj.weight[3, 4] = torch.nan
    with pytest.raises(OptionError, match="not finite"):
        gm(X)
    _, report = traced(stack)
    assert "not finite" in str(report.sites[2].decision.reason)


def test_training_through_it_is_an_error():
    gm, _ = traced(Stack())
    with pytest.raises(RuntimeError, match="is for inference only: it has no gradient"):
        gm(X).sum().backward()


@torch.no_grad()
def test_it_is_copied_and_pickled():
    gm, _ = traced(Biased(), **EVERYTHING)
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(other(X), gm(X))
        other.down_proj.weight.mul_(2)
        assert not torch.equal(other(X), gm(X))


# ---- make_fx -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"dense_prefix": 3}])
@torch.no_grad()
def test_a_graph_of_make_fx(mode, options):
    """Its weights are constants without a name, so the projections are told by a pattern."""
    model, options = Biased(), {"projections": "*", **options}
    gm = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(X)
    done, report = rewrite(gm, AmberConfig(**options), example_inputs=(X,))
    assert report.graphs[0].rewritten == 2
    assert torch.equal(done(X), compiled(model, X, options))
    again, _ = rewrite(done, AmberConfig(**options, strict=True))
    assert str(again.graph) == str(done.graph)
    model.down_proj.weight.mul_(torch.rand_like(model.down_proj.weight))
    assert torch.equal(done(X), compiled(model, X, options))


# ---- Dynamo --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behind", "options"),
    [("eager", {}), ("aot_eager", {}), ("aot_eager", {"quantize": "int8"})],
)
@torch.no_grad()
def test_a_graph_of_dynamo_in_another_backend(behind, options):
    stack, reports = Stack(), []

    def backend(gm, inputs):
        done, report = rewrite(gm, AmberConfig(**options), example_inputs=inputs)
        reports.append(report)
        return lookup_backend(behind)(done, inputs)

    wanted = compiled(stack, X, options)
    torch._dynamo.reset()
    model = torch.compile(stack, backend=backend)
    assert torch.equal(model(X), wanted)
    assert torch.equal(model(X[:, :1]), stack(X[:, :1]))
    assert [report.graphs[0].phase for report in reports] == ["prefill", "decode"]
    stack.layers[0].down_proj.weight.mul_(2 * torch.rand(WIDTH, 96))
    changed = model(X)
    assert torch.equal(changed, compiled(stack, X, options))


@torch.no_grad()
def test_dynamos_own_graph_stays_as_it_is():
    texts = []

    def backend(gm, inputs):
        before = str(gm.graph)
        done, _ = rewrite(gm)  # names and shapes are there; values are not asked for
        texts.append((before, str(gm.graph), str(done.graph)))
        return done

    torch.compile(Stack(), backend=backend)(X)
    ((before, after, done),) = texts
    assert before == after != done


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}])
@torch.no_grad()
def test_a_graph_of_dynamo_in_inductor(options, inductor):
    from torch._inductor.compile_fx import compile_fx

    stack = Stack()

    def backend(gm, inputs):
        done, _ = rewrite(gm, AmberConfig(**options), example_inputs=inputs)
        return compile_fx(done, inputs)

    wanted = torch.compile(stack, backend="amber", options=options)(X)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(stack, backend=backend)(X), wanted)


def test_weights_spread_over_processes_are_refused(monkeypatch):
    monkeypatch.setattr("amber_compile.programs.graph_module.is_sharded", is_parameter)
    module = symbolic_trace(nn.Linear(16, 16))
    with pytest.raises(OptionError, match="program holds bias as a DTensor"):
        rewrite(module, example_inputs=(torch.ones(2, 4, 16),))


def is_parameter(value: object) -> bool:
    return isinstance(value, nn.Parameter)
