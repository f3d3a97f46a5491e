"""Rewritten programs of torch.export: they answer as the backend does, and stay whole programs."""

import io
from dataclasses import replace

import pytest
import torch
from programs_of import (
    FULL,
    OPTIONS,
    Biased,
    Logits,
    X,
    compiled,
    decomposed,
    exported,
    plan_of,
    torch_warnings,
)
from stack import MIDDLE, WIDTH, Stack, sparse
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.functional import linear
from zoo import ZOO

from amber_compile import AmberConfig, Plan, Settings, last_reports, permute_channels, rewrite
from amber_compile.errors import OptionError, PlanError
from amber_compile.permutable import permutable
from amber_compile.permute import permutation_tensors
from amber_compile.plan import PlannedSite

PERMUTED = Settings(permuted=True)
ORDER = [
    *(InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT),
]
"""In which torch.export lists the inputs of a program."""
EVERYTHING = {"projections": "*", "quantize": "int8"}


def rewritten(program: ExportedProgram, **options: object) -> ExportedProgram:
    return rewrite(program, AmberConfig(**options))[0]


def held_by(program: ExportedProgram, kind: InputKind) -> list[str]:
    return [str(spec.target) for spec in program.graph_signature.input_specs if spec.kind is kind]


def calls(program: ExportedProgram, name: str) -> int:
    return sum(name in str(node.target) for node in program.graph.nodes)


class One(nn.Module):
    """One projection by a tensor that is held in one of several ways."""

    def __init__(self, held: str = "parameter") -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(WIDTH, WIDTH)
        if held == "parameter":
            self.w = nn.Parameter(weight)
        elif held == "constant":
            self.w = weight
        else:
            self.register_buffer("w", weight, persistent=held == "buffer")

    def forward(self, x):
        return linear(x, self.w)


# ---- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_program_of_any_length_answers_like_the_backend(options, dtype):
    stack = Stack().to(dtype)
    module = rewritten(exported(stack, X.to(dtype)), **options).module()
    for tokens in (8, 2, 33):
        x = torch.randn(2, tokens, WIDTH).to(dtype)
        assert torch.equal(module(x), compiled(stack, x, options))


@torch.no_grad()
def test_it_computes_what_the_settings_say():
    stack = Stack()
    module = rewritten(exported(stack), correction=None).module()
    assert torch.equal(module(X), sparse(stack, X))


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama_bf16", {}), ("gpt2", EVERYTHING), ("phi3", {}), ("qwen3_moe", {})],
)
@torch.no_grad()
def test_models_answer_like_the_backend(name, options):
    model, inputs = ZOO[name].build()
    logits, ids = Logits(model), inputs["input_ids"]
    # of one length: PyTorch 2.11 exports no other of these
    program, report = rewrite(exported(logits, ids, least=None), AmberConfig(**options))
    assert torch.equal(program.module()(ids), compiled(logits, ids, options))
    theirs = {site.name: site.decision for site in last_reports()[-1].sites}
    assert {site.name: site.decision for site in report.sites} == theirs


@pytest.mark.parametrize("smooth", [False, True])
@torch.no_grad()
def test_every_tensor_of_a_plan(smooth):
    stack = Stack()
    plan = plan_of(stack, smooth=smooth)
    program = rewritten(exported(stack), plan=plan, strict=True)
    assert torch.equal(program.module()(X), compiled(stack, X, {"plan": plan}))
    kept = {name for name in stack.state_dict() if name in program.state_dict}
    assert kept == (set() if smooth else {f"layers.{at}.up_proj.weight" for at in (0, 1)})


@pytest.mark.parametrize("fold", [False, True])
@torch.no_grad()
def test_smooth_vectors_are_folded_as_by_the_backend(fold):
    model = Biased()
    options = {"plan": plan_of(model, "dense"), "fold_smooth": fold}
    program, report = rewrite(exported(model), AmberConfig(**options))
    assert torch.equal(program.module()(X), compiled(model, X, options))
    places = [site.smoothing for site in report.sites]
    assert places == [site.smoothing for site in last_reports()[-1].sites]
    assert places[0].startswith("folded into norm" if fold else "in the quantise kernel")


@torch.no_grad()
def test_a_plan_for_permuted_channels_needs_a_permuted_model():
    stack, sites, tensors = Stack(), {}, {}
    for name, found in permutable(stack, X).items():
        weight = stack.get_submodule(name).weight
        if isinstance(found, str):
            sites[name] = PlannedSite(tuple(weight.shape), "dense")
        else:
            sites[name] = PlannedSite(tuple(weight.shape), PERMUTED, None, found.moves)
            tensors[name] = permutation_tensors(weight, torch.randperm(MIDDLE))
    plan = Plan(sites, {}, tensors)
    _, report = rewrite(exported(stack), AmberConfig(plan=plan))
    reasons = [str(site.decision.reason) for site in report.sites if site.decision.obstacle]
    assert len(reasons) == 2
    assert all("permute_channels" in reason for reason in reasons)
    permute_channels(stack, plan)
    program = rewritten(exported(stack), plan=plan, strict=True)
    assert torch.equal(program.module()(X), compiled(stack, X, {"plan": plan}))
    assert calls(program, "nm_select") == 2


@pytest.mark.parametrize("quantize", [None, "int8"])
@torch.no_grad()
def test_a_gate_with_a_bias_is_split(quantize):
    model, options = Biased(), {"quantize": quantize}
    program, report = rewrite(exported(model), AmberConfig(**options))
    assert report.sites[0].decision.settings.part == "gate"
    assert torch.equal(program.module()(X), compiled(model, X, options))
    assert calls(program, "quantized_linear" if quantize else "aten.linear") == 3


@pytest.mark.parametrize("options", [{}, EVERYTHING])
@torch.no_grad()
def test_decomposed_programs_are_rewritten_too(options):
    """There products are mm and addmm of flattened tokens; 4:4 keeps all channels."""
    model = Biased()
    program = decomposed(exported(model))
    assert calls(program, "aten.addmm") == 2
    module = rewritten(program, **options).module()
    torch.testing.assert_close(module(X), compiled(model, X, options))
    done = rewritten(program, pattern="4:4", projections="*")
    assert calls(done, "nm_select") == 2
    assert torch.equal(done.module()(X), program.module()(X))


@torch.no_grad()
def test_a_plan_for_a_decomposed_program():
    model = Biased()
    plan = plan_of(model, replace(FULL, pattern="4:4"), smooth=False)
    program = decomposed(exported(model))
    module = rewritten(program, plan=plan, strict=True).module()
    torch.testing.assert_close(module(X), compiled(model, X, {"plan": plan}))


@torch.no_grad()
def test_sizes_computed_in_python_do_not_matter():
    class Padded(Biased):
        def forward(self, x):
            return super().forward(x) + x.new_zeros(torch.sym_max(x.shape[1], 4)).sum()

    program = rewritten(exported(Padded()))
    assert torch.equal(program.module()(X), compiled(Biased(), X, {}))
    torch.export.save(program, io.BytesIO())


# ---- one token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_call_with_one_token_stays_dense(batch):
    stack, x = Stack(), X[:batch]
    program, report = rewrite(exported(stack, x, least=1))
    assert report.graphs[0].phase == "unknown"
    module = program.module()
    assert torch.equal(module(x[:, :1]), stack(x[:, :1]))
    for tokens in (2, 8):
        assert torch.equal(module(x[:, :tokens]), compiled(stack, x[:, :tokens], {}))


@torch.no_grad()
def test_a_dimension_of_two_or_more_is_prefill():
    assert rewrite(exported(Stack()))[1].graphs[0].phase == "prefill"
    assert rewrite(exported(Stack(), least=None))[1].graphs[0].phase == "prefill"


def test_a_program_for_one_token_is_decode():
    program = exported(Stack(), X[:, :1], least=None)
    done, report = rewrite(program, AmberConfig(quantize="int8"))
    assert report.graphs[0].phase == "decode"
    assert str(done.graph) == str(program.graph)
    assert done.state_dict.keys() == program.state_dict.keys()


# ---- its state -----------------------------------------------------------------------------------


def test_the_given_program_stays_as_it_is():
    program = exported(Biased())
    text, state = str(program.graph_module.code), dict(program.state_dict)
    signature = str(program.graph_signature)
    done = rewritten(program, **EVERYTHING)
    assert calls(done, "nm_quantize")
    assert (str(program.graph_module.code), str(program.graph_signature)) == (text, signature)
    assert program.state_dict.keys() == state.keys()
    assert all(program.state_dict[name] is one for name, one in state.items())


def test_what_is_derived_is_a_buffer_and_what_is_unread_goes():
    program = rewritten(exported(Stack()), quantize="int8")
    assert held_by(program, InputKind.PARAMETER) == []
    buffers = held_by(program, InputKind.BUFFER)
    assert list(program.state_dict) == buffers
    assert all(name.startswith("amber_") for name in buffers)
    codes = [name for name in buffers if program.state_dict[name].dtype == torch.int8]
    assert len(codes) == 6
    assert not any(one.requires_grad for one in program.state_dict.values())


@torch.no_grad()
def test_a_tied_weight_stays():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, WIDTH)
            self.q_proj = nn.Linear(WIDTH, 32)
            self.q_proj.weight = self.embedding.weight

        def forward(self, ids):
            return self.q_proj(self.embedding(ids))

    model, ids = Tied(), torch.randint(32, (2, 8))
    program = rewritten(exported(model, ids), quantize="int8")
    assert "embedding.weight" in program.state_dict
    assert torch.equal(program.module()(ids), compiled(model, ids, {"quantize": "int8"}))


@pytest.mark.parametrize("held", ["parameter", "buffer", "unsaved buffer", "constant"])
@pytest.mark.parametrize("quantize", [None, "int8"])
@torch.no_grad()
def test_a_weight_may_be_held_in_any_way(held, quantize):
    options = {"projections": "*", "quantize": quantize}
    program = rewritten(exported(One(held)), **options)
    assert torch.equal(program.module()(X), compiled(One(), X, options))
    assert ("w" in {**program.state_dict, **program.constants}) is not bool(quantize)
    kinds = [spec.kind for spec in program.graph_signature.input_specs]
    assert kinds == sorted(kinds, key=ORDER.index)


@pytest.mark.parametrize("persistent", [False, True])
@torch.no_grad()
def test_a_name_that_is_taken(persistent):
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            factor = torch.full((WIDTH,), 2.0)
            self.register_buffer("amber_weight_norm_0", factor, persistent=persistent)
            self.q_proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.q_proj(x * self.amber_weight_norm_0)

    model = Taken()
    program = rewritten(exported(model))
    assert "amber_weight_norm_0_" in program.state_dict
    assert torch.equal(program.module()(X), compiled(model, X, {}))


def test_a_weight_that_is_not_finite_has_no_factor():
    stack = Stack()
    with torch.no_grad():
        stack.layers[0].down_proj.weight[3, 4] = torch.inf
    _, report = rewrite(exported(stack))
    assert [site.decision.sparse for site in report.sites] == [1, 0, 0, 1, 0, 1]
    assert "not finite" in str(report.sites[2].decision.reason)


def test_a_weight_on_another_device_is_named():
    program = exported(Stack())
    name = "layers.1.up_proj.weight"
    program.state_dict[name] = nn.Parameter(program.state_dict[name].to("meta"))
    with pytest.raises(OptionError, match=rf"{name} lies on meta, its graph records cpu; valid"):
        rewrite(program)


# ---- programs that write -------------------------------------------------------------------------


class Cached(nn.Module):
    """Counts its calls and keeps its keys, as a model with a static cache does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("keys", torch.zeros(2, 16, WIDTH))

    def forward(self, x):
        self.calls.add_(1)
        self.keys[:, : x.shape[1]] = self.q_proj(x)
        return self.keys @ x.transpose(1, 2), self.calls + 0


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("functional", [False, True])
@torch.no_grad()
def test_what_a_program_writes_is_written(functional, quantize):
    program = exported(Cached(), least=None)
    program = decomposed(program) if functional else program
    done = rewritten(program, quantize=quantize)
    kinds = [spec.kind for spec in done.graph_signature.output_specs]
    assert kinds.count(OutputKind.BUFFER_MUTATION) == 2 * functional
    module, model = done.module(), Cached()
    for count in (1, 2):
        scores, calls = module(X * count)
        torch.testing.assert_close(scores, compiled(model, X * count, {"quantize": quantize})[0])
        assert calls == count
    torch.testing.assert_close(module.keys, model.keys)


@pytest.mark.parametrize("functional", [False, True])
@torch.no_grad()
def test_nothing_is_derived_from_a_weight_that_the_program_writes_to(functional):
    class Learning(One):
        def forward(self, x):
            y = super().forward(x)
            self.w.mul_(0.5)
            return y

    program = exported(Learning("buffer"))
    program = decomposed(program) if functional else program
    done, report = rewrite(program, AmberConfig(**EVERYTHING))
    reason = "its weight is a constant" if functional else "the graph writes to its weight"
    assert reason in str(report.sites[0].decision.reason)
    module, wanted = done.module(), program.module()(X)
    torch.testing.assert_close(module(X), wanted / 2)  # they share the weight


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}])
@torch.no_grad()
def test_an_output_that_is_a_rewritten_product(options):
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(WIDTH, WIDTH))
    program = rewritten(exported(model), **options)
    (spec,) = program.graph_signature.output_specs
    assert spec.arg.name == program.graph.output_node().args[0][0].name
    assert torch.equal(program.module()(X), compiled(model, X, options))


# ---- a program like any other --------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_it_is_saved_decomposed_and_unflattened(options):
    program, file = rewritten(exported(Stack()), **options), io.BytesIO()
    answer = program.module()(X)
    with torch_warnings():
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        unflattened = torch.export.unflatten(program)
    assert torch.equal(loaded.module()(X), answer)
    assert loaded.state_dict.keys() == program.state_dict.keys()
    assert torch.equal(unflattened(X), answer)
    torch.testing.assert_close(decomposed(program).module()(X), answer)
    module = program.module()
    assert module.state_dict().keys() == program.state_dict.keys()


GATED = {"projections": ["*gate_up_proj", "*down_proj"]}
AGAIN = {"gate": {}, "both halves": GATED, "int8": EVERYTHING, "dense prefix": {"dense_prefix": 2}}


@pytest.mark.parametrize("options", AGAIN.values(), ids=AGAIN)
def test_a_rewritten_program_stays_as_it_is(options):
    program = rewritten(exported(Biased()), **options)
    again, report = rewrite(program, AmberConfig(**options, strict=True))
    assert str(again.graph) == str(program.graph)
    assert report.graphs[0].rewritten == 0
    assert all(site.decision.reason for site in report.sites)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("settings", [FULL, Settings(part="gate")], ids=["whole", "gate"])
def test_a_program_rewritten_by_a_plan_stays_as_it_is(settings, smooth):
    plan = plan_of(Biased(), settings, smooth)
    if settings.part:
        dense = replace(plan.sites["down_proj"], choice="dense")
        plan = replace(plan, sites={**plan.sites, "down_proj": dense})
    program = rewritten(exported(Biased()), plan=plan, strict=True)
    again, report = rewrite(program, AmberConfig(plan=plan, strict=True))
    assert str(again.graph) == str(program.graph)
    reasons = {site.decision.reason for site in report.sites if site.name == "gate_up_proj"}
    assert reasons & {"it is rewritten already", "its input is already a selection"}


def test_the_plan_of_another_model_is_refused():
    with pytest.raises(PlanError, match="gate_up_proj"):
        rewrite(exported(Biased()), AmberConfig(plan=plan_of(Stack())))
