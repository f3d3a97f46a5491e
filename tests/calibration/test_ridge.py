"""A ridge regression is least squares with rows added, and sums may be taken in parts."""

import pytest
import torch
from toy import SITES, Toy, text

from amber_compile.calibration.observe import observing, weights_of
from amber_compile.calibration.reading import Reader
from amber_compile.calibration.resume import Checkpoint
from amber_compile.calibration.ridge import add_grams, fit_weights, ridge_weight
from amber_compile.calibration.selection import Sparse, selection
from amber_compile.calibration.statistics import Statistics
from amber_compile.settings import Settings

HALF = Sparse(Settings("2:4", "magnitude"))


def kept_of(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.amber.nm_select(x, None, 2, 4)


def sums(x: torch.Tensor) -> dict[str, torch.Tensor]:
    into = Statistics()
    add_grams(into, "site", x, kept_of(x))
    return into.of("site")


def test_the_weight_is_that_of_least_squares() -> None:
    x = torch.randn(60, 8) @ torch.randn(8, 8)  # correlated channels
    weight, damping = torch.randn(5, 8), 0.1
    found = ridge_weight(weight, **sums(x), damping=damping)
    kept = kept_of(x).double()
    root = (damping * kept.square().sum(0).mean()).sqrt() * torch.eye(8, dtype=torch.float64)
    rows, wanted = torch.cat([kept, root]), torch.cat([x.double(), root]) @ weight.double().T
    exact = torch.linalg.lstsq(rows, wanted).solution.T
    # float32 sums of 60 products: relative error up to 60 · 2⁻²⁴, times the condition number
    assert (found - exact).norm() < 60 * 2.0**-24 * torch.linalg.cond(rows) ** 2 * exact.norm()


def test_without_a_selection_the_weight_stays() -> None:
    x, weight = torch.randn(20, 8), torch.randn(5, 8)
    into = Statistics()
    add_grams(into, "site", x, x)
    assert torch.equal(ridge_weight(weight, **into.of("site")), weight.double())
    zero = torch.zeros(8, 8, dtype=torch.float64)
    assert torch.equal(ridge_weight(weight, zero, zero), weight.double())


def test_two_halves_are_the_whole() -> None:
    x = torch.randint(-8, 8, (32, 8)).float()  # exact sums
    whole, first, second = sums(x), sums(x[:20]), sums(x[20:])
    assert all(torch.equal(whole[name], first[name] + second[name]) for name in whole)


def fitted(memory: int, case: dict[str, Sparse]) -> dict[str, Sparse]:
    model = Toy()
    reader = Reader(model, Checkpoint(None, {}), progress=False)
    weights = weights_of(model, SITES)
    return fit_weights(reader, weights, case, list(enumerate(text())), memory)


def test_less_memory_reads_the_text_more_often_and_gives_the_same() -> None:
    case = dict.fromkeys(SITES, HALF)
    at_once, one_by_one = fitted(1 << 30, case), fitted(1, case)
    for name in SITES:
        assert at_once[name].settings.updated_weight
        assert torch.equal(at_once[name].tensors["weight"], one_by_one[name].tensors["weight"])


def test_the_outputs_come_closer() -> None:
    model, case = Toy(), dict.fromkeys(SITES, HALF)
    found, batches = fitted(1 << 30, case), text()
    before, after = dict.fromkeys(SITES, 0.0), dict.fromkeys(SITES, 0.0)

    def visit(call):
        y, kept = call(), selection(call, HALF)
        before[call.name] += float((call(kept) - y).square().sum())
        updated = call(kept, found[call.name].tensors["weight"])
        after[call.name] += float((updated - y).square().sum())
        return y

    with torch.no_grad(), observing(weights_of(model, SITES), visit):
        for batch in batches:
            model(batch)
    assert all(after[name] < before[name] for name in SITES)


@pytest.mark.parametrize("name", ["layers.0.gate_proj"])
def test_half_a_product_keeps_its_weight(name: str) -> None:
    half = Sparse(Settings("2:4", "magnitude", part="gate"))
    assert fitted(1 << 30, {name: half}) == {name: half}


def test_a_permuted_plan_has_its_weight_in_its_own_order() -> None:
    name = "layers.0.down_proj"
    order = torch.arange(32).view(8, 4).flip(1).flatten()  # groups stay, so the selection does
    settings = Settings("2:4", "magnitude", permuted=True)
    permuted = Sparse(settings, {"permutation": order.int()})
    straight, turned = (fitted(1 << 30, {name: one})[name] for one in (HALF, permuted))
    assert torch.equal(straight.tensors["weight"][:, order], turned.tensors["weight"])
