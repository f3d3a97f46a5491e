"""Permuting a model's channels: exact, once, back again, and refused for another model."""

import pytest
import torch
from torch import nn
from zoo import ZOO

from amber_compile import Plan, Settings
from amber_compile.errors import PlanError
from amber_compile.permutable import permutable
from amber_compile.permute import (
    join_orders,
    permutation_tensors,
    permute_channels,
    split_orders,
    why_not_permuted,
)
from amber_compile.permuted_plan import permuted_plan
from amber_compile.plan import Move, PlannedSite

FOUND = {
    "llama_biased": 4,
    "phi3": 4,
    "gpt2": 4,
    "gpt_neox": 4,
    "mixtral_batched": 2,  # o_proj; of the experts none
    "bert": 4,
}
"""How many sites of two layers may be permuted."""


def plan_of(model: nn.Module, found, seed: int = 0) -> Plan:
    """Return a plan that permutes everything that was found, at random."""
    draw = torch.Generator().manual_seed(seed)
    sites, tensors = {}, {}
    for site, one in found.items():
        if isinstance(one, str):
            continue
        own = one.moves[0]
        weight = model.get_parameter(own.parameter)
        weight = weight if own.dim == 1 else weight.t()
        orders = [torch.randperm(one.size, generator=draw) for _ in range(one.groups)]
        tensors[site] = permutation_tensors(weight, join_orders(torch.stack(orders), own.repeats))
        sites[site] = PlannedSite(tuple(weight.shape), Settings(permuted=True), None, one.moves)
    return Plan(sites, {}, tensors)


def without_cache(name: str, inputs):
    return inputs if name == "bert" else inputs | {"use_cache": False}


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_models_compute_the_same(name):
    model, inputs = ZOO[name].build()
    inputs = without_cache(name, inputs)
    rough = model(**inputs).logits
    model.double()
    plan = plan_of(model, permutable(model, kwargs=inputs))
    assert len(plan.sites) == FOUND[name]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(**inputs).logits
    done = permute_channels(model, plan)
    assert done.changed == tuple(plan.sites)
    after = model(**inputs).logits
    moved = [key for key, value in model.state_dict().items() if not value.equal(values[key])]
    assert len(moved) == done.parameters
    # fp32 rounds 2^29 times as coarsely, in every step and not only in the sums whose order changed
    budget = 2 * (rough.double() - before).abs().max() * 2.0**-29
    assert (after - before).abs().max() <= budget + 96 * 2.0**-53 * before.abs().max()
    permute_channels(model, plan, undo=True)
    assert all(value.equal(values[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_generation_with_a_cache_goes_on_as_before():
    model, inputs = ZOO["llama"].build()
    model.double()
    plan = plan_of(model, permutable(model, kwargs=without_cache("llama", inputs)))
    settings = {"max_new_tokens": 12, "do_sample": False}
    before = model.generate(**inputs, **settings)
    permute_channels(model, plan)
    assert torch.equal(model.generate(**inputs, **settings), before)


def test_a_cache_that_leaves_the_graph_keeps_the_values_in_order():
    model, inputs = ZOO["llama"].build()
    found = permutable(model, kwargs=inputs)
    assert "the order of its channels matters" in found["model.layers.0.self_attn.o_proj"]
    assert not isinstance(found["model.layers.0.mlp.down_proj"], str)


def test_a_model_of_several_graphs_is_left_alone():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            h = self.up(x)
            torch._dynamo.graph_break()
            return self.down(h)

    found = permutable(Broken(), torch.randn(2, 3, 8))
    assert set(found.values()) == {"the model is traced as 2 graphs, which may share parameters"}


def test_a_model_on_the_meta_device_can_be_asked():
    with torch.device("meta"):
        model, ids = Small(), torch.zeros(2, 8)
    assert not isinstance(permutable(model, ids)["down"], str)


# ---- one small model ----


class Small(nn.Module):
    """An MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def plan(model):
    return plan_of(model, permutable(model, torch.randn(2, 8)))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_rows_and_columns_follow_the_permutation(model, plan):
    before, order = state(model), plan.tensors.get("down", "permutation").long()
    done = permute_channels(model, plan)
    assert torch.equal(model.up.weight, before["up.weight"][order])
    assert torch.equal(model.up.bias, before["up.bias"][order])
    assert torch.equal(model.down.weight, before["down.weight"][:, order])
    assert torch.equal(model.down.bias, before["down.bias"])
    assert str(done) == "1 sites moved, in 3 parameters"


def test_a_second_time_changes_nothing(model, plan):
    permute_channels(model, plan)
    before = state(model)
    again = permute_channels(model, plan)
    assert (again.changed, again.left, again.parameters) == ((), ("down",), 0)
    assert same(state(model), before)
    assert "1 were in order already" in str(again)


def test_undone_bit_for_bit(model, plan):
    before = state(model)
    assert permute_channels(model, plan, undo=True).left == ("down",)
    permute_channels(model, plan)
    assert not same(state(model), before)
    permute_channels(model, plan, undo=True)
    assert same(state(model), before)


def test_it_goes_through_a_file(model, plan, tmp_path):
    plan.save(tmp_path / "small.plan")
    loaded = Plan.load(tmp_path / "small.plan")
    assert loaded == plan
    permute_channels(model, loaded)
    assert permute_channels(model, plan).changed == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_same_model(model, plan, dtype):
    model.to(dtype)
    assert permute_channels(model, plan).changed == ("down",)
    assert permute_channels(model, plan).left == ("down",)
    permute_channels(model.to(torch.float32), plan, undo=True)


def test_a_compiled_model_and_its_derived_tensors_follow(model, plan):
    version = model.down.weight._version
    permute_channels(torch.compile(model, backend="eager"), plan)
    assert model.down.weight._version > version


def test_another_model_is_refused_by_the_site(model, plan):
    other, before = Small(), state(model)
    with pytest.raises(PlanError, match="site 'down': its weight is neither the one that the plan"):
        permute_channels(other, plan)
    with torch.no_grad():
        model.down.weight[0, 3] *= 1.1  # fine-tuned
    with pytest.raises(PlanError, match="site 'down'"):
        permute_channels(model, plan)
    assert same({"up.weight": model.up.weight}, before | {"up.weight": before["up.weight"]})


class Two(nn.Module):
    """Two MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Small(), Small()

    def forward(self, x):
        return self.b(self.a(x).softmax(-1))


def test_nothing_is_changed_if_one_site_is_refused():
    model = Two()
    plan = plan_of(model, permutable(model, torch.randn(2, 8)))
    with torch.no_grad():
        model.b.down.weight.mul_(2)
    before = state(model)
    with pytest.raises(PlanError, match=r"site 'b\.down'"):
        permute_channels(model, plan)
    assert same(state(model), before)


def test_a_model_half_done_is_finished():
    model = Two()
    plan = plan_of(model, permutable(model, torch.randn(2, 8)))
    half = Plan({"a.down": plan.sites["a.down"]}, {}, {"a.down": plan.tensors.to_dict()["a.down"]})
    permute_channels(model, half)
    done = permute_channels(model, plan)
    assert (done.changed, done.left) == (("b.down",), ("a.down",))


def test_a_failure_half_way_leaves_the_site_as_it_was(model, plan, monkeypatch):
    from amber_compile import permute

    before, real, calls = state(model), permute._permute, []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        real(*arguments)

    monkeypatch.setattr(permute, "_permute", fails_once)
    with pytest.raises(MemoryError):
        permute_channels(model, plan)
    assert same(state(model), before)


def changed(plan: Plan, moves=None, **tensors) -> Plan:
    site = plan.sites["down"]
    own = plan.tensors.to_dict()["down"] | tensors
    site = PlannedSite(site.shape, site.choice, None, site.moves if moves is None else moves)
    return Plan({"down": site}, {}, {"down": own})


def test_a_plan_that_does_not_fit_names_what_is_wrong(model, plan):
    own, *rest = plan.sites["down"].moves
    cases = {
        "does not say what its permutation moves": changed(plan, ()),
        "'gone', which the model does not have": changed(plan, (own, Move("gone", 0, 0, 16))),
        r"'up\.bias', whose shape \[16\] is too small": changed(
            plan, (own, Move("up.bias", 0, 8, 16))
        ),
        r"'up\.bias', whose shape \[16\] is too": changed(plan, (own, Move("up.bias", 1, 0, 16))),
        "from head to head": changed(plan, (Move(own.parameter, 1, 0, 8), *rest)),
    }
    before = state(model)
    for message, wrong in cases.items():
        with pytest.raises(PlanError, match=f"site 'down': .*{message}"):
            permute_channels(model, wrong)
    assert same(state(model), before)


def test_parameters_that_cannot_be_permuted(model, plan):
    with torch.device("meta"):
        meta = Small()
    with pytest.raises(PlanError, match="is no plain tensor with values"):
        permute_channels(meta, plan)
    model.up.other = nn.Parameter(model.up.weight.data)
    with pytest.raises(PlanError, match=r"shares its memory with 'up\.other'"):
        permute_channels(model, plan)


def test_a_plan_without_permutations_does_nothing(model):
    assert permute_channels(model, Plan({})).changed == ()


# ---- what the analysis asks ----


def test_why_not_permuted(model, plan):
    tensors = plan.tensors
    assert "not permuted: call permute_channels" in why_not_permuted(
        model.down.weight, tensors, "down"
    )
    permute_channels(model, plan)
    assert why_not_permuted(model.down.weight, tensors, "down") is None
    assert why_not_permuted(model.down.weight.bfloat16(), tensors, "down") is None
    wrong = "neither the one that the plan was made for nor that one permuted"
    assert wrong in why_not_permuted(torch.randn(8, 16), tensors, "down")
    assert wrong in why_not_permuted(torch.randn(8, 12), tensors, "down")
    assert "does not say how its channels" in why_not_permuted(torch.randn(8, 16), tensors, "up")
    assert why_not_permuted(torch.empty(8, 16, device="meta"), tensors, "down") is None


# ---- orders ----


@pytest.mark.parametrize(("groups", "size", "repeats"), [(1, 16, 1), (2, 4, 1), (2, 4, 3)])
def test_orders_come_back(groups, size, repeats):
    orders = torch.stack([torch.randperm(size) for _ in range(groups)])
    permutation = join_orders(orders, repeats)
    assert torch.equal(permutation.sort().values, torch.arange(groups * repeats * size).int())
    assert torch.equal(split_orders(permutation, Move("w", 1, 0, size, repeats)), orders)


def test_what_is_no_order_within_heads():
    own = Move("w", 1, 0, 4, 2)
    assert split_orders(torch.arange(15), own) is None
    assert split_orders(torch.arange(16).flip(0), own) is None  # from head to head
    apart = join_orders(torch.stack([torch.arange(4), torch.arange(4).flip(0)]), 1)
    assert split_orders(apart, own) is None  # two heads that share values, in two orders
    assert split_orders(apart, Move("w", 1, 0, 4, 1)) is not None


def test_what_is_no_permutation():
    weight = torch.randn(8, 4)
    with pytest.raises(PlanError, match="a permutation of 4 channels must hold each of them once"):
        permutation_tensors(weight, torch.tensor([0, 1, 1, 3]))
    with pytest.raises(PlanError, match="a permutation of 4 channels"):
        permutation_tensors(weight, torch.tensor([0, 1, 2]))


def test_a_row_that_does_not_tell_is_refused():
    weight = torch.randn(8, 4)
    weight[0] = 0
    with pytest.raises(PlanError, match="would not tell whether a model is permuted"):
        permutation_tensors(weight, torch.tensor([1, 0, 3, 2]))
    with pytest.raises(PlanError, match="would not tell"):
        permutation_tensors(torch.randn(8, 4), torch.arange(4))


# ---- plans that calibration made ----


class Gated(nn.Module):
    """A fused gate and up projection, scaled outputs as the epilogue has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(8, 32, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.rest(self.gate_up(x))

    def by(self, x, scale, bias, weight):
        return self.rest(x @ weight.t() * scale + bias)

    def rest(self, h):
        gate, up = h.chunk(2, -1)
        return self.down(gate.sigmoid() * up)


@torch.no_grad()
def test_what_a_plan_holds_for_outputs_moves_along():
    model, x = Gated().double(), torch.randn(4, 8).double()
    weight = torch.randn(32, 8).double()  # a second one, for prefill
    tensors = {
        "gate_up": {
            "output_scale": torch.rand(32),
            "output_bias": torch.rand(32),
            "weight": weight,
            "factor": torch.rand(8),
        },
        "down": {"permutation": torch.randperm(16).int(), "factor": torch.rand(16)},
    }
    sites = {
        "gate_up": PlannedSite((32, 8), Settings(output_scale=True, updated_weight=True)),
        "down": PlannedSite((8, 16), Settings()),
    }
    before = Plan(sites, {"by": "a test"}, tensors)
    plan = permuted_plan(before, permutable(model, x), {"down": model.down.weight})
    assert plan.made == before.made
    assert plan.sites["down"].choice == Settings(permuted=True)
    assert plan.sites["gate_up"] == before.sites["gate_up"]
    for site in sites:  # what belongs to inputs stays
        assert torch.equal(plan.tensors.get(site, "factor"), tensors[site]["factor"])

    def outputs(of: Plan) -> torch.Tensor:
        held = [of.tensors.get("gate_up", name) for name in ("output_scale", "output_bias")]
        return model.by(x, *held, of.tensors.get("gate_up", "weight"))

    wanted = outputs(before)
    assert not torch.allclose(outputs(plan), wanted)
    permute_channels(model, plan)
    budget = 16 * 2.0**-53 * (model.down.weight.abs().sum(1).max() * 16)
    assert (outputs(plan) - wanted).abs().max() <= budget


def test_an_order_that_changes_nothing_is_dropped(model):
    same = {"down": {"permutation": torch.arange(16).int(), "factor": torch.ones(16)}}
    plan = Plan({"down": PlannedSite((8, 16), Settings(permuted=True))}, {}, same)
    found = permuted_plan(plan, {}, {})
    assert found.sites["down"].choice == Settings()
    assert found.tensors.names("down") == ("factor",)


def test_a_site_that_cannot_be_permuted_is_told_with_the_reason(model):
    given = {"down": {"permutation": torch.arange(16).flip(0).int()}}
    plan = Plan({"down": PlannedSite((8, 16), Settings())}, {}, given)
    with pytest.raises(PlanError, match="site 'down' cannot be permuted: because"):
        permuted_plan(plan, {"down": "because"}, {})
    with pytest.raises(PlanError, match="site 'down' cannot be permuted: it is no projection"):
        permuted_plan(plan, {}, {})
    found = permutable(model, torch.randn(2, 8))
    with pytest.raises(PlanError, match="site 'down' cannot be permuted: its first row is the"):
        permuted_plan(plan, found, {"down": torch.zeros(8, 16)})
