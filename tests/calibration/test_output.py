"""α and β give each output channel its mean and its spread back."""

import torch
from toy import SITES, Toy, text

from amber_compile.calibration.observe import observing, weights_of
from amber_compile.calibration.output import add_output, fit_outputs, output_correction
from amber_compile.calibration.reading import Reader
from amber_compile.calibration.resume import Checkpoint
from amber_compile.calibration.selection import Sparse, sparse_product
from amber_compile.calibration.statistics import Statistics
from amber_compile.settings import Settings

HALF = Sparse(Settings("2:4", "magnitude"))


def correction(y: torch.Tensor, sparse: torch.Tensor):
    into = Statistics()
    for part, kept in zip(y.split(7), sparse.split(7), strict=True):  # in parts: as ranks do
        add_output(into, "site", part, kept)
    held = into.of("site")
    return output_correction(held["output.rows"], held["output.sums"])


def test_mean_and_spread_are_the_dense_ones() -> None:
    y = torch.randn(50, 3) + 2
    sparse = 0.7 * y - 1 + 0.3 * torch.randn(50, 3)
    scale, bias = correction(y, sparse)
    mean, spread = y.double().mean(0), y.double().std(0, correction=0)
    repaired = sparse.double() * scale.double() + bias.double()
    # sums in float64; α and β are rounded to float32 once each
    rounding = 2.0**-23 * (sparse.abs().amax(0) + bias.abs())
    assert ((repaired.mean(0) - mean).abs() <= rounding).all()
    assert ((repaired.std(0, correction=0) - spread).abs() <= rounding).all()


def test_an_error_beside_the_signal_does_not_shrink_it() -> None:
    drawn = torch.Generator().manual_seed(0)
    y = torch.randn(4096, 1, generator=drawn)
    kept, dropped = y, torch.randn(4096, 1, generator=drawn)  # y_s = signal without a part of it
    scale, _ = correction(kept + dropped, kept)
    assert abs(scale.item() - 2**0.5) < 0.05  # least squares would say 1; 3 / √4096 is .05


def test_a_constant_output_is_shifted_only() -> None:
    for y, sparse in ((3.3, 1.1), (3.3, 0.0), (0.0, 0.0)):
        scale, bias = correction(torch.full((9, 1), y), torch.full((9, 1), sparse))
        assert scale.item() == 1
        assert abs(bias.item() - (y - sparse)) < 2.0**-20


def test_every_site_has_its_moments_back_and_halves_stay() -> None:
    model = Toy(bias=True)
    reader, weights = Reader(model, Checkpoint(None, {}), progress=False), weights_of(model, SITES)
    half = Sparse(Settings("2:4", "magnitude", part="gate"))
    case = dict.fromkeys(SITES, HALF) | {SITES[1]: half}
    found = fit_outputs(reader, weights, case, list(enumerate(text())))
    assert found[SITES[1]] == half
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def visit(call):
        y = call()
        pair = y.flatten(0, 1), sparse_product(call, found[call.name]).flatten(0, 1)
        seen.setdefault(call.name, []).append(pair)
        return y

    with torch.no_grad(), observing(weights, visit):
        for batch in text():
            model(batch)
    del seen[SITES[1]]
    for pairs in seen.values():
        y, sparse = (torch.cat(rows).double() for rows in zip(*pairs, strict=True))
        bound = 2.0**-20 * y.abs().max()
        assert (y.mean(0) - sparse.mean(0)).abs().max() < bound
        assert (y.std(0) - sparse.std(0)).abs().max() < bound
