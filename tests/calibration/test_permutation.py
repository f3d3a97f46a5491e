"""The order found is a permutation, loses less than before, and nothing where that is possible."""

import pytest
import torch
from toy import SITES, Toy, text

from amber_compile.calibration import permutation
from amber_compile.calibration.observe import observing, weights_of
from amber_compile.calibration.permutation import balanced_permutation, lost, token_samples
from amber_compile.calibration.reading import Reader
from amber_compile.calibration.resume import Checkpoint
from amber_compile.calibration.selection import Sparse
from amber_compile.scores import weight_norm
from amber_compile.settings import Settings


def uneven(channels: int, rows: int = 64, seed: int = 0) -> torch.Tensor:
    """Return squares whose strong channels lie side by side."""
    drawn = torch.Generator().manual_seed(seed)
    strength = torch.linspace(3, -3, channels).exp()
    return (torch.randn(rows, channels, generator=drawn) * strength).square()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (8, 16)])
def test_every_channel_has_a_place_and_less_is_lost(n: int, m: int) -> None:
    squares = uneven(64)
    order = balanced_permutation(squares, n, m)
    assert order.dtype == torch.int32
    assert torch.equal(order.sort().values, torch.arange(64, dtype=torch.int32))
    assert lost(squares[:, order.long()], n, m) < 0.5 * lost(squares, n, m)


@pytest.mark.parametrize("seed", range(5))
def test_strong_channels_are_spread_evenly(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    strong = torch.randperm(64, generator=drawn) < 32  # two for each group of four: nothing is lost
    squares = torch.rand(64, 64, generator=drawn) * strong
    assert lost(squares, 2, 4) > 0
    assert lost(squares[:, balanced_permutation(squares, 2, 4).long()], 2, 4) == 0


@pytest.mark.parametrize("seed", range(5))
def test_channels_that_take_turns_share_a_group(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    even = torch.randperm(64, generator=drawn) < 32  # on even tokens these, on odd ones the others
    squares = torch.ones(64, 64)
    squares[0::2, even] = squares[1::2, ~even] = 0
    order = balanced_permutation(squares, 2, 4).long()
    assert lost(squares, 2, 4) > 0
    assert lost(squares[:, order], 2, 4) == 0


def test_what_cannot_be_better_stays() -> None:
    straight = torch.arange(16, dtype=torch.int32)
    assert torch.equal(balanced_permutation(torch.ones(8, 16), 2, 4), straight)
    assert torch.equal(balanced_permutation(uneven(16), 4, 4), straight)
    heads_of_six = balanced_permutation(uneven(12), 2, 4, groups=2)
    assert torch.equal(heads_of_six, torch.arange(12, dtype=torch.int32))
    assert torch.equal(balanced_permutation(torch.full((4, 16), torch.nan), 2, 4), straight)


def test_heads_keep_their_channels_and_share_their_order() -> None:
    squares = uneven(64)[:, torch.randperm(64)]
    order = balanced_permutation(squares, 2, 4, groups=2, repeats=2).long().view(2, 2, 16)
    assert torch.equal(order // 16, torch.arange(4).view(2, 2, 1).expand(2, 2, 16))
    assert torch.equal(order[:, 0] % 16, order[:, 1] % 16)
    assert not torch.equal(order[0] % 16, order[1] % 16)


def test_many_groups_are_refined_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    squares = uneven(64)
    monkeypatch.setattr(permutation, "LARGEST", 4)
    monkeypatch.setattr(permutation, "CHUNK", 1)
    order = balanced_permutation(squares, 2, 4).long()
    assert torch.equal(order.sort().values, torch.arange(64))
    assert lost(squares[:, order], 2, 4) < 0.5 * lost(squares, 2, 4)


def test_samples_are_squared_scores_spread_over_the_text() -> None:
    model, batches = Toy(), text(3)
    reader, weights = Reader(model, Checkpoint(None, {}), progress=False), weights_of(model, SITES)
    case = dict.fromkeys(SITES, Sparse(Settings("2:4", "weight_norm")))
    found = token_samples(reader, weights, case, list(enumerate(batches)), rows=6)
    seen: dict[str, list[torch.Tensor]] = {}

    def visit(call):
        scores = call.rows[[0, len(call.rows) - 1]] * weight_norm(call.weight)
        seen.setdefault(call.name, []).append(scores.square())
        return call()

    with torch.no_grad(), observing(weights, visit):
        for batch in batches:
            model(batch)
    assert all(torch.equal(found[name], torch.cat(seen[name])) for name in SITES)
