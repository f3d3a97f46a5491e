"""A model is calibrated in its best order, answers as before, and lies afterwards as it did."""

import pytest
import torch
from toy import SITES, Toy, text

from amber_compile import Plan
from amber_compile.calibration.observe import observing, weights_of
from amber_compile.calibration.ordering import Orders, find_orders, ordered
from amber_compile.calibration.output import fit_outputs
from amber_compile.calibration.reading import Reader, as_it_is
from amber_compile.calibration.resume import Checkpoint
from amber_compile.calibration.selection import Sparse, sparse_product
from amber_compile.permutable import permutable
from amber_compile.permute import permute_channels
from amber_compile.plan import PlannedSite
from amber_compile.settings import Settings

DOWN = ["layers.0.down_proj", "layers.1.down_proj"]
CASE = dict.fromkeys(SITES, Sparse(Settings("2:4", "weight_norm")))


def uneven() -> Toy:
    """Return a model whose strong channels lie side by side."""
    model = Toy(bias=True)
    with torch.no_grad():
        for layer in model.layers:
            layer.up_proj.weight *= torch.linspace(2, -2, 32).exp()[:, None]
    return model


def orders_of(model: Toy) -> Orders:
    reader = Reader(model, Checkpoint(None, {}), progress=False)
    batches = list(enumerate(text()))
    may = permutable(model, batches[0][1])
    with as_it_is(model):
        return find_orders(reader, weights_of(model, SITES), CASE, batches, may)


def answers(model: Toy, case: dict[str, Sparse]) -> torch.Tensor:
    def visit(call):
        return sparse_product(call, case[call.name])

    with torch.no_grad(), observing(weights_of(model, case), visit):
        return model(text()[0])["logits"]


def test_only_what_may_be_permuted_and_loses_less_has_an_order() -> None:
    found = orders_of(uneven())
    assert list(found.tensors) == list(found.moves) == DOWN
    assert all(after <= 0.95 * before for before, after in found.lost.values())


def test_the_model_is_in_order_inside_and_as_it_was_afterwards() -> None:
    model = uneven()
    orders = orders_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = answers(model, {})

    def look_and_fail() -> None:
        with ordered(model, orders):
            down = model.get_submodule(DOWN[0]).weight
            order = orders.tensors[DOWN[0]]["permutation"].long()
            assert torch.equal(down, before[f"{DOWN[0]}.weight"][:, order])
            # the same products of 32 terms and fewer, summed in another order, in two layers
            bound = 64 * 2.0**-24 * dense.abs().max()
            assert torch.allclose(answers(model, {}), dense, rtol=0, atol=bound)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_holds_what_was_fitted_in_order() -> None:
    model = uneven()
    orders = orders_of(model)
    reader, weights = Reader(model, Checkpoint(None, {}), progress=False), weights_of(model, SITES)
    with ordered(model, orders):
        case = fit_outputs(reader, weights, CASE, list(enumerate(text())))
        expected = answers(model, case)
    planned = {name: orders.sparse(name, sparse) for name, sparse in case.items()}
    assert [name for name in SITES if planned[name].settings.permuted] == DOWN
    sites = {
        name: PlannedSite(
            tuple(weights[name].shape), planned[name].settings, moves=orders.moves.get(name, ())
        )
        for name in SITES
    }
    plan = Plan(sites, {}, {name: one.tensors for name, one in planned.items()})
    permute_channels(model, plan)
    assert torch.equal(answers(model, case), expected)


def test_nothing_to_move_is_nothing_moved() -> None:
    model = Toy()
    with ordered(model, Orders()):
        assert torch.equal(model(text()[0])["logits"], Toy()(text()[0])["logits"])
