"""Inductor's pass: what it recognises, what it refuses, and what it leaves dense."""

import pickle
import warnings

import pytest
import torch
from behind_aot import behind_aot, rewritten, targets
from stack import Layer, Stack, sparse
from test_calibrated import expected, plan_of
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from torch.nn.functional import linear

from amber_compile import AmberConfig, Plan, Report, last_reports
from amber_compile.errors import OptionError
from amber_compile.integrations.inductor import AmberPass, chain, inductor_options
from amber_compile.integrations.traced_inputs import mark_weights
from amber_compile.kernels import nm_select
from amber_compile.naming import PARAMETER
from amber_compile.scores import weight_norm

OPTIONS = {"correction": None}
X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
PRE, POST = "post_grad_custom_pre_pass", "post_grad_custom_post_pass"


def sites(report=-1):
    return {site.name: site for site in last_reports()[report].sites}


def config(**options):
    return AmberConfig(**OPTIONS | options)


class Cached(CustomGraphPass):
    """A pass of somebody else, which says what it did."""

    def __init__(self, name, ran):
        self.name, self.ran = name, ran

    def __call__(self, graph: Graph) -> None:
        self.ran.append(self.name)

    def uuid(self):
        return self.name


# ---- what is a weight ----------------------------------------------------------------------------


@torch.no_grad()
def test_a_stack_is_sparse_under_its_names():
    model, seen = Stack(), []
    assert torch.equal(rewritten(model, seen, **OPTIONS)(X), sparse(model, X))
    assert [name for name, site in sites().items() if site.decision.sparse] == [
        f"layers.{at}.{name}_proj" for at in (0, 1) for name in ("gate", "down")
    ]
    assert targets(seen[0]).count("amber.nm_select.default") == 4
    assert targets(seen[0]).count("amber.derive.default") == 4


@torch.no_grad()
def test_no_length_compiles_a_graph_that_it_would_not_without_amber():
    model, dense, seen = Stack(), [], []
    plain = torch.compile(model, backend=behind_aot(seen=dense), dynamic=True)
    for length in (8, 5, 3, 1):
        plain(X[:, :length])
    torch._dynamo.reset()
    run = torch.compile(model, backend=behind_aot(AmberPass(config()), seen=seen), dynamic=True)
    for length in (8, 5, 3):
        assert torch.equal(run(X[:, :length]), sparse(model, X[:, :length]))
    assert torch.equal(run(X[:, :1]), model(X[:, :1]))
    assert len(seen) == len(dense)
    assert last_reports()[-1].graphs[0].phase == "decode"
    assert not last_reports()[-1].graphs[0].rewritten


@torch.no_grad()
def test_a_matrix_that_is_passed_as_an_argument_is_a_weight_if_it_is_a_parameter():
    class Tied(nn.Module):
        def forward(self, x, weight):
            return linear(x, weight)

    weight = torch.randn(96, 64)
    run = rewritten(Tied(), projections="*", **OPTIONS)
    assert torch.equal(run(X, weight), linear(X, weight))
    assert not last_reports()[-1].sites
    selected = nm_select(X, weight_norm(weight), 2, 4)
    assert torch.equal(run(X, nn.Parameter(weight)), linear(selected, weight))
    assert len(last_reports()[-1].sites) == 1


@torch.no_grad()
def test_a_buffer_that_is_written_to_is_no_weight():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.randn(8, 64))

        def forward(self, x):
            self.keys.mul_(2)
            return x @ self.keys.T

    model, twin = Cache(), Cache()
    twin.load_state_dict(model.state_dict())
    run = rewritten(model, projections="*", **OPTIONS)
    for _ in range(2):
        assert torch.equal(run(X), twin(X))


@torch.no_grad()
def test_without_dynamo_weights_are_known_by_their_use():
    w, v = torch.randn(64, 96), torch.randn(96, 96)
    gm = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x, w, v: (x @ w + 1, v @ v.T), tracing_mode="fake"
    )(X[0], w, v)
    assert mark_weights(gm) == 1
    assert mark_weights(gm) == 1  # and again
    AmberPass(config(projections="*"))(gm.graph)
    gm.recompile()
    selected = nm_select(X[0], weight_norm(w.T), 2, 4)
    assert torch.equal(gm(X[0], w, v)[0], selected @ w + 1)


@torch.no_grad()
def test_a_graph_with_other_inputs_than_dynamos_is_not_named_by_them():
    piece = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x, w, v: (x @ w).relu() @ v, tracing_mode="fake"
    )(X[0], torch.randn(64, 96), torch.randn(96, 64))
    names = []

    def compiler(gm, inputs):
        mark_weights(piece)
        names.extend(node.meta.get(PARAMETER) for node in piece.graph.find_nodes(op="placeholder"))
        return gm.forward

    layer = Layer()  # of as many inputs, with other shapes
    del layer.up_proj
    layer.forward = lambda x: layer.down_proj(layer.gate_proj(x))
    torch.compile(layer, backend=compiler)(X)
    assert names == [None, "", ""]


@torch.no_grad()
def test_layers_compiled_one_by_one_share_a_graph_and_keep_their_factors():
    model, graphs = Stack(), []
    wanted = sparse(model, X)
    backend = behind_aot(AmberPass(config()), seen=graphs)
    for layer in model.layers:
        layer.compile(backend=backend)
    assert torch.equal(model(X), wanted)
    assert len(graphs) == 1
    assert set(sites()) == {"gate_proj", "up_proj", "down_proj"}


@torch.no_grad()
def test_weights_that_are_written_to_or_replaced_are_noticed():
    model = Stack()
    run = rewritten(model, **OPTIONS)
    run(X)
    model.layers[0].gate_proj.weight.mul_(torch.linspace(1, 3, 64))
    assert torch.equal(run(X), sparse(model, X))
    model.layers[1].down_proj.weight = nn.Parameter(torch.randn(64, 96))
    assert torch.equal(run(X), sparse(model, X))
    model.load_state_dict(Stack(seed=1).state_dict())
    assert torch.equal(run(X), sparse(Stack(seed=1), X))
    assert len(last_reports()) == 1


@torch.no_grad()
def test_a_weight_that_is_not_finite_is_an_error_of_the_call():
    model = Stack()
    run = rewritten(model, **OPTIONS)
    run(X)
    model.layers[0].gate_proj.weight[0, 0] = torch.inf
    with pytest.raises(OptionError, match="finite"):
        run(X)


# ---- plans ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_plan_decides_and_brings_its_tensors():
    model = Stack()
    plan = plan_of(model)
    seen = []
    result = rewritten(model, seen, plan=plan)(X)
    assert torch.equal(result, expected(model, X, plan))
    assert targets(seen[0]).count("amber.derive.default") == 4 * 4


def test_a_plan_of_another_model_is_an_error_with_its_words():
    plan = plan_of(Stack())
    with (
        pytest.raises(BackendCompilerFailed, match=r"PlanError: .*plan") as caught,
        torch.no_grad(),
    ):
        rewritten(Layer(), plan=plan)(X)
    assert "gate_proj" in str(caught.value)
    assert "give it the whole model" in str(caught.value)


# ---- what stays dense ----------------------------------------------------------------------------


def test_a_graph_for_training_stays_dense_and_says_so_once():
    model, twin = Stack(), Stack()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="the graph needs gradients") as told:
        rewritten(model, **OPTIONS)(x).sum().backward()
    assert len(told) == 1
    twin(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert len(last_reports()) == 1
    assert "gradients" in sites()["layers.0.gate_proj"].decision.reason


def test_a_graph_for_training_is_an_error_under_strict_if_something_was_planned():
    with pytest.raises(BackendCompilerFailed, match=r"RewriteError: strict=True.*gradients"):
        rewritten(Stack(), strict=True)(X)
    torch._dynamo.reset()
    rewritten(Stack(), strict=True, skip="*")(X)  # nothing was


@torch.no_grad()
def test_a_graph_that_cannot_be_rewritten_stays_as_it_is_and_says_so(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("no good")

    monkeypatch.setattr("amber_compile.rewritten.verify", fail)
    model, seen = Stack(), []
    with pytest.warns(UserWarning, match=r"stays dense.*AssertionError: no good"):
        result = rewritten(model, seen, quantize="int8")(X)
    assert torch.equal(result, model(X))
    assert not any("amber" in target for target in targets(seen[0]))
    assert last_reports()[-1].graphs[0].fallback == "AssertionError: no good"
    for site in last_reports()[-1].sites:
        assert not site.decision.rewritten
        assert "no good" in f"{site.decision.reason}{site.decision.unquantized}"
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"RewriteError: .*no good"):
        rewritten(model, strict=True)(X)


# ---- two passes ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_second_pass_changes_nothing(quantize):
    model, once, twice = Stack(), [], []
    options = OPTIONS | {"quantize": quantize}
    result = rewritten(model, once, **options)(X)
    torch._dynamo.reset()
    passes = AmberPass(AmberConfig(**options)), AmberPass(AmberConfig(**options))
    assert torch.equal(torch.compile(model, backend=behind_aot(*passes, seen=twice))(X), result)
    assert targets(twice[0]) == targets(once[0])
    reasons = {site.decision.reason for site in last_reports()[-1].sites}
    assert any("already" in str(reason) for reason in reasons)


def test_passes_of_a_chain_run_in_turn_and_are_cached_together():
    ran = []
    first = Cached("first", ran)
    both = chain(first, AmberPass(config()))
    assert both.uuid() == ("first", AmberPass(config()).uuid())
    assert chain(ran.append, AmberPass()).uuid() is None  # of a plain function nobody knows
    assert chain(both, ran.append).uuid() is None
    assert chain(first, AmberPass(config())) == both
    assert chain(AmberPass(config()), first) != both
    with torch.no_grad():
        model = Stack()
        assert torch.equal(torch.compile(model, backend=behind_aot(both))(X), sparse(model, X))
    assert ran == ["first"]


def test_a_pass_that_is_configured_already_runs_first():
    ran = []
    assert inductor_options(config())[PRE] == AmberPass(config())
    with torch._inductor.config.patch({POST: Cached("theirs", ran)}):
        assert inductor_options(config())[PRE] == AmberPass(config())
        chained = inductor_options(config(), hook=POST)[POST]
    assert chained.uuid()[0] == "theirs"
    with torch._inductor.config.patch({PRE: [Cached("a", ran), Cached("b", ran)]}):
        assert inductor_options(config())[PRE].uuid()[:2] == ("a", "b")


def test_two_of_ambers_in_one_hook_are_an_error():
    one, other = AmberPass(), AmberPass(config())
    with pytest.raises(OptionError, match="2 AmberPass for one hook"):
        chain(one, other)
    with pytest.raises(OptionError, match="2 AmberPass"):
        chain(chain(print, one), other)
    with (
        torch._inductor.config.patch({PRE: chain(print, one)}),
        pytest.raises(OptionError, match="2 AmberPass"),
    ):
        inductor_options()


@pytest.mark.parametrize("passes", [(), (None, AmberPass()), ("pass",)])
def test_a_chain_of_anything_else_is_an_error(passes):
    with pytest.raises(OptionError, match="valid: one callable"):
        chain(*passes)


def test_a_pass_that_takes_more_than_a_graph_goes_into_a_list():
    kinds = pytest.importorskip("torch._inductor.custom_graph_pass")
    if not hasattr(kinds, "CustomInferenceAwareGraphPass"):
        pytest.skip("PyTorch 2.11 has no such pass")

    class Aware(kinds.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            return None

        def uuid(self):
            return "aware"

    with pytest.raises(OptionError, match="valid: a list"):
        chain(Aware(), AmberPass())


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "max-autotune"},
        {"inductor": {"freezing": True}},
        {"check": True},
        {"quantize": "int8", "decode": "int8"},
    ],
)
def test_options_of_the_backend_are_refused(options):
    with pytest.raises(OptionError, match="is for backend='amber' only"):
        AmberPass(AmberConfig(**options))


def test_what_is_no_config_no_hook_and_no_graph():
    with pytest.raises(OptionError, match="valid: an AmberConfig"):
        AmberPass({"pattern": "2:4"})  # type: ignore[arg-type]  # what is tested
    with pytest.raises(OptionError, match="unknown hook 'post_grad'"):
        inductor_options(hook="post_grad")
    with pytest.raises(OptionError, match="belongs to no module"):
        AmberPass()(Graph())


def test_passes_of_equal_options_are_equal_and_travel():
    plan = plan_of(Stack())
    one, same = AmberPass(AmberConfig(plan=plan)), AmberPass(AmberConfig(plan=plan))
    assert one == same
    assert hash(one) == hash(same)
    assert one != AmberPass(config())
    assert one != "pass"
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert copy.uuid() == one.uuid()


def test_the_uuid_tells_options_plans_sources_and_kernels_apart(monkeypatch, tmp_path):
    plan = plan_of(Stack())
    plan.save(tmp_path / "plan.json")
    other = plan_of(Stack())
    first = next(iter(other.sites))
    changed = Plan(
        {**other.sites, first: other.sites["layers.0.up_proj"]}, {}, tensors=plan.tensors
    )
    configs = [
        AmberConfig(),
        *(AmberConfig(**option) for option in OPTION_BY_OPTION),
        AmberConfig(plan=plan),
        AmberConfig(plan=changed),
        AmberConfig(plan=Plan(plan.sites, {})),
        AmberConfig(plan=plan, skip="*.gate_proj"),
    ]
    found = [AmberPass(one).uuid() for one in configs]
    assert len(set(found)) == len(found)
    assert AmberPass(AmberConfig(plan=tmp_path / "plan.json")).uuid() in found
    assert [AmberPass(one).uuid() for one in configs] == found
    for where in ("inductor.source_hash", "inductor.installed_version", "inductor.traced_names"):
        with monkeypatch.context() as patch:
            patch.setattr(f"amber_compile.integrations.{where}", lambda *_: "another")
            assert AmberPass().uuid() not in found
    monkeypatch.setattr("amber_compile.integrations.inductor.int8_kernel", lambda: "another")
    assert AmberPass().uuid() == found[0]
    assert AmberPass(AmberConfig(quantize="int8")).uuid() not in found


OPTION_BY_OPTION = (
    {"preset": "paper"},
    {"pattern": "4:8"},
    {"score": "magnitude"},
    {"correction": None},
    {"projections": "*.up_proj"},
    {"projections": ["*.up_proj", "*.down_proj"]},
    {"skip": "*.up_proj"},
    {"quantize": "int8"},
    {"quantize": "int8", "quantize_skip": "*.up_proj"},
    {"quantize": "int8", "fold_smooth": True},
    {"min_tokens": 2},
    {"dense_prefix": 1},
    {"strict": True},
)


def test_the_rules_are_part_of_the_source_hash(monkeypatch, tmp_path):
    from amber_compile import inductor

    before = inductor.source_hash()
    real = inductor.resources.files

    def files(package):
        return tmp_path if package == "amber_compile" else real(package)

    for source in real("amber_compile").iterdir():
        if source.name.endswith(".py"):
            (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "presets").mkdir()
    for source in (real("amber_compile") / "presets").iterdir():
        (tmp_path / "presets" / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(inductor.resources, "files", files)
    inductor.source_hash.cache_clear()
    assert inductor.source_hash() == before
    (tmp_path / "presets" / "roles.json").write_text("{}")
    inductor.source_hash.cache_clear()
    changed = inductor.source_hash()
    inductor.source_hash.cache_clear()
    assert changed != before


def test_another_pytorch_is_refused(monkeypatch):
    from amber_compile.errors import VersionError

    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(VersionError, match=r"2\.11 to 2\.13"):
        AmberPass()


def test_reports_of_the_pass_are_those_of_any_graph():
    with torch.no_grad(), warnings.catch_warnings():
        rewritten(Stack(), **OPTIONS)(X)
    report = Report.merge(last_reports())
    assert "4 of 6 projections sparse" in report.summary()
    assert report.graphs[0].stages[0].name == "traced"
    assert report.to_json()["coverage"] > 0.5


@torch.no_grad()
def test_cuda_graphs_leave_the_look_up_out():
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    seen = []
    rewritten(Stack(), seen, **OPTIONS)(X)
    calls = [node for node in seen[0].graph.nodes if node.op == "call_function"]
    unsafe = {str(node.target) for node in calls if is_cudagraph_unsafe_fx_node(node)}
    assert unsafe == {"amber.derive.default"}
