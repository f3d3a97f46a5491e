"""One pass measures every site: ranges, gradients, relative error, and KL to second order."""

import math

import pytest
import torch
from torch import Tensor
from toy import SITES, Toy, text

from amber_compile.calibration.answers import Answer
from amber_compile.calibration.errors import CalibrationError
from amber_compile.calibration.observe import observing, weights_of
from amber_compile.calibration.reading import Reader
from amber_compile.calibration.resume import Checkpoint
from amber_compile.calibration.selection import Sparse, sparse_product
from amber_compile.calibration.sensitivity import Sensing, sensitivities
from amber_compile.calibration.statistics import Statistics
from amber_compile.calibration.validation import distances
from amber_compile.settings import Settings

HALF = {"plain": Sparse(Settings("2:4", "magnitude"))}


def sense(model: torch.nn.Module, batches: list, options=HALF, seed: int = 0) -> Statistics:
    weights = weights_of(model, SITES)
    reader = Reader(model, Checkpoint(None, {}), progress=False)
    return Sensing(reader, weights, dict.fromkeys(SITES, options), seed)(
        "sensitivity", list(enumerate(batches)), ""
    )


def inputs_of(model: torch.nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}

    def visit(call):
        seen.setdefault(call.name, []).append(call.rows.clone())
        return call()

    with torch.no_grad(), observing(weights_of(model, SITES), visit):
        for batch in batches:
            model(batch)
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_ranges_are_exact_and_errors_are_the_paper_s() -> None:
    model, batches = Toy(bias=True), text()
    found = sense(model, batches)
    for name, x in inputs_of(model, batches).items():
        linear = model.get_submodule(name)
        assert torch.equal(found.of(name)["absmax"], x.abs().amax(0))
        assert found.of(name)["rows"] == len(x)
        kept = torch.ops.amber.nm_select(x, None, 2, 4).double()
        weight = linear.weight.double()
        exact = ((kept - x.double()) @ weight.T).norm() / (x.double() @ weight.T).norm()
        error = sensitivities(found, name)["plain"].error
        # float32 products of K terms: each is off by at most K rounding steps of their size
        assert error == pytest.approx(exact.item(), rel=x.shape[1] * 2.0**-23)


def test_damage_is_half_the_mean_square_of_the_change_along_the_gradient() -> None:
    model, batches = Toy(), text(2)
    found = sense(model, batches, seed=3)
    for name in SITES:
        total = 0.0
        for number, batch in enumerate(batches):
            linear, rows = model.get_submodule(name), []

            def take(_, inputs, y, rows=rows) -> None:
                y.retain_grad()
                rows.append((inputs[0], y))

            handle = linear.register_forward_hook(take)
            answer = Answer(model(batch), batch)
            handle.remove()
            answer.loss(torch.Generator().manual_seed(3 * 1_000_003 + number)).backward()
            (x, y) = rows[0]
            kept = torch.ops.amber.nm_select(x.detach(), None, 2, 4)
            change = (linear(kept) - y).detach()
            total += float((y.grad * change).sum(-1).square().sum()) / 2
        tokens = sum(batch.numel() for batch in batches)
        measured = sensitivities(found, name)["plain"].damage
        assert measured == pytest.approx(total / tokens, rel=1e-4)
    model.zero_grad(set_to_none=True)


def test_a_small_change_costs_what_the_gradient_says() -> None:
    """8:8 but for one channel: the change is so small that the KL is its second order."""
    model, batches = Toy(), text(64)
    name = "layers.1.down_proj"
    with torch.no_grad():  # three of four channels hardly matter
        model.get_submodule(name).weight[:, 1::2] *= 0.05
    options = {"plain": Sparse(Settings("2:4", "weight_norm"))}
    found = sense(model, batches, options)
    reader = Reader(model, Checkpoint(None, {}), progress=False)
    case = {"one": {name: options["plain"]}}
    weights = weights_of(model, SITES)
    exact = distances(reader, weights, case, list(enumerate(batches)), "exact", "")["one"]
    damage = sensitivities(found, name)["plain"].damage
    assert exact.mean > 0
    # 1536 drawn labels: the estimate's own error is about sqrt(2 / 1536), here six of those
    assert damage == pytest.approx(exact.mean, rel=6 * math.sqrt(2 / 1536))


def test_nothing_pruned_is_no_damage() -> None:
    found = sense(Toy(), text(2), {"all": Sparse(Settings("4:4", "magnitude"))})
    for name in SITES:
        assert vars_of(sensitivities(found, name)["all"]) == (0.0, 0.0)


def vars_of(sensitivity) -> tuple[float, float]:
    return sensitivity.error, sensitivity.damage


def test_a_model_without_logits_is_measured_by_its_output() -> None:
    model, batches = Toy(logits=False), text(4)
    found = sense(model, batches)
    assert all(sensitivities(found, name)["plain"].damage > 0 for name in SITES)
    dense, other = (Answer(model(batch), batch) for batch in batches[:2])
    exact = (other.values - dense.values).square().sum(-1) / dense.values.square().sum(-1) / 2
    assert torch.allclose(dense.distances(other), exact.double(), rtol=1e-6)
    assert not dense.logits


def test_padding_counts_in_no_answer() -> None:
    model, tokens = Toy(), text(1)[0]
    mask = torch.ones_like(tokens)
    mask[:, 8:] = 0
    padded = Answer(model(tokens), {"input_ids": tokens, "attention_mask": mask})
    assert padded.values.shape[0] == 16
    whole = Answer(model(tokens), tokens).values.view(2, 12, -1)
    assert torch.equal(padded.values, whole[:, :8].flatten(0, 1))


def test_the_first_site_that_reads_a_nan_is_named() -> None:
    model = Toy()
    with torch.no_grad():
        model.layers[1].q_proj.weight[3, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers\.1\.gate_proj reads a NaN or an infinity"):
        sense(model, text(2))


def test_the_model_and_its_random_numbers_stay() -> None:
    model = Toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sense(model, text(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_sum_does_not_grow_with_the_text() -> None:
    sizes = [
        sum(value.numel() for value in sense(Toy(), text(count)).tensors().values())
        for count in (1, 6)
    ]
    assert sizes[0] == sizes[1]


def test_a_product_is_what_the_compiled_model_computes() -> None:
    """Every setting of a plan, eager and rewritten."""
    import amber_compile
    from amber_compile.plan import Plan, PlannedSite

    torch.manual_seed(0)
    model, tokens = Toy(bias=True), text(1)[0]
    every = Settings(
        "2:4", "calibrated", "norm", 1, None, output_scale=True, output_bias=True,
        updated_weight=True,
    )  # fmt: skip
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in SITES}
    case = {
        name: Sparse(
            every,
            {
                "factor": torch.rand(shape[1]) + 0.5,
                "output_scale": torch.rand(shape[0]) + 0.5,
                "output_bias": torch.randn(shape[0]),
                "weight": torch.randn(shape) * 0.25,
            },
        )
        for name, shape in shapes.items()
    }
    sites = {name: PlannedSite(shape, every) for name, shape in shapes.items()}
    sites["lm_head"] = PlannedSite((24, 16), "dense")
    plan = Plan(sites, {}, {name: dict(sparse.tensors) for name, sparse in case.items()})
    with torch.no_grad():
        compiled = torch.compile(model, backend="amber_eager", options={"plan": plan})(tokens)
        with observing(
            weights_of(model, SITES), lambda call: sparse_product(call, case[call.name])
        ):
            eager = model(tokens)
    assert amber_compile.last_reports()[-1].coverage == 1.0
    assert torch.equal(eager["logits"], compiled["logits"])
