"""``bisect``: planted faults are found where they were planted, and nowhere else."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import StaticCache
from zoo import ZOO

from amber_compile import AmberConfig, last_reports
from amber_compile.debug.bisect_sites import Search, bisect
from amber_compile.debug.bisection import Culprit
from amber_compile.errors import OptionError

WIDTH = 64
X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(0))
DOWN: dict[str, Any] = {"projections": "*.down_proj", "correction": None}
LAYERS = 9


class Layer(nn.Module):
    """One projection, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.down_proj = nn.Linear(width, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.down_proj(x.repeat(1, 1, self.width // WIDTH))


class Deep(nn.Module):
    """Layers that each change a little; one of them is twice as wide."""

    def __init__(self, wide: int | None = None, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [2 * WIDTH if at == wide else WIDTH for at in range(LAYERS)]
        self.layers = nn.ModuleList([Layer(width) for width in widths])
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


@torch.no_grad()
def sensitive(model: Deep, at: int) -> Deep:
    """Give the layer ``at`` weights that are large and cancel, as outliers do."""
    weight = model.layers[at].down_proj.weight
    weight.copy_(torch.randn_like(weight) * 40 / WIDTH**0.5)
    return model


def site(at: int) -> str:
    return f"layers.{at}.down_proj"


def spoiling(what: Callable[[GraphModule], bool], value: float = 3.0) -> Any:
    """Return a compiler whose code for the graphs ``what`` adds ``value``."""

    def compiler(
        gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
    ) -> Any:
        forward, added = gm.forward, value if what(gm) else 0
        return lambda *arguments: tuple(one + added for one in forward(*arguments))

    return compiler


def selects(gm: GraphModule, width: int) -> bool:
    """Whether something of this width is selected from."""
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.amber.nm_select.default)
    return any(node.meta["example_value"].shape[-1] == width for node in nodes)


# ---- the method's own error ----------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 4, LAYERS - 1])
def test_a_layer_that_sparsity_destroys(at: int) -> None:
    found = bisect(sensitive(Deep(), at), X, bound=0.2, compiler=None, **DOWN)
    assert found.blamed == "method"
    (culprit,) = found.sites
    assert culprit.name == site(at)
    assert culprit.alone > 0.2
    assert culprit.without is not None
    assert culprit.with_it is not None
    assert culprit.without <= 0.2 < culprit.with_it
    assert found.verdict == f"method: {site(at)} is to blame"
    assert str(culprit) in str(found)


def test_two_layers_are_both_found() -> None:
    model = sensitive(sensitive(Deep(), 2), 6)
    found = bisect(model, X, bound=0.1, compiler=None, **DOWN)
    assert sorted(one.name for one in found.sites) == [site(2), site(6)]


def test_an_error_that_grows_gradually() -> None:
    plain = bisect(Deep(), X, bound=0.0, compiler=None, **DOWN)
    bound = 0.9 * plain.error
    found = bisect(Deep(), X, bound=bound, compiler=None, **DOWN)
    assert found.sites == []
    assert "no single site is to blame" in found.verdict
    alone = [one.alone for one in found.contributions]
    assert len(alone) == 5
    assert alone == sorted(alone, reverse=True)
    assert 0 < alone[-1] <= alone[0] <= bound
    assert found.contributions[0].name in str(found)


class Arithmetic:
    """Runs whose output is the list of sparse sites, to be measured by a sum."""

    def __init__(self, sites: int) -> None:
        self.planned = self.ranked = [str(at) for at in range(sites)]
        self.steps = ["method"]
        self.count = 0

    def plan(self) -> None:
        pass

    def output(self, step: str, names: Sequence[str]) -> list[str]:
        self.count += step != "dense"
        return [] if step == "dense" else list(names)


def test_a_site_whose_error_others_cancel() -> None:
    def measure(_: list[str], names: list[str]) -> float:
        return 0.0 if not names else 0.5 if names == ["1"] else 0.03 * len(names)

    found = Search(Arithmetic(8), 0.2, measure).result()  # type: ignore[arg-type]  # a stand-in
    assert found.sites == [Culprit("1", 0.5, 0.03 * 7, 0.03 * 8)]


def test_a_site_that_is_bad_in_company_only() -> None:
    def measure(_: list[str], names: list[str]) -> float:
        return 1.0 if {"2", "5"} <= set(names) else 0.0

    found = Search(Arithmetic(8), 0.2, measure).result()  # type: ignore[arg-type]  # a stand-in
    assert found.sites == [Culprit("5", 0.0, 0.0, 1.0)]


@pytest.mark.parametrize("at", [0, 1, 130, 222, 223])
def test_224_sites_take_eight_halvings(at: int) -> None:
    def measure(_: list[str], names: list[str]) -> float:
        return float(str(at) in names)

    runs = Arithmetic(224)
    found = Search(runs, 0.2, measure).result()  # type: ignore[arg-type]  # a stand-in
    assert [one.name for one in found.sites] == [str(at)]
    assert found.runs <= 8 + 6


def test_layers_that_share_a_graph_are_told_apart() -> None:
    model = sensitive(Deep(broken=True), 5)
    found = bisect(model, X, bound=0.2, compiler=None, **DOWN)
    assert [one.name for one in found.sites] == [site(5)]


def test_an_error_within_the_bound() -> None:
    found = bisect(Deep(), X, bound=0.5, compiler=None, **DOWN)
    assert (found.blamed, found.sites, found.contributions) == ("", [], [])
    assert 0 < found.error < 0.5
    assert "nothing to find" in str(found)
    assert [step.name for step in found.steps] == ["method", "kernels"]


def test_the_search_takes_a_logarithm_of_runs() -> None:
    found = bisect(sensitive(Deep(), 5), X, bound=0.2, compiler=None, **DOWN)
    steps, halvings, verification = 4, math.ceil(math.log2(LAYERS)), 4
    assert found.runs <= steps + halvings + verification


def test_a_measure_of_ones_own() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def measure(expected: Tensor, actual: Tensor) -> float:
        seen.append((expected, actual))
        return math.nan if float((expected - actual).abs().max()) > 2 else 0.0

    model = sensitive(Deep(), 3)
    found = bisect(model, X, bound=1e9, error=measure, compiler=None, **DOWN)
    assert [one.name for one in found.sites] == [site(3)]
    with torch.no_grad():
        assert torch.equal(seen[0][0], model(X))


# ---- wrong kernels -------------------------------------------------------------------------------


def test_a_kernel_that_is_wrong_for_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    nm_select = importlib.import_module("amber_compile.kernels.nm_select")  # not the operator

    def wrong(library: Any, x: Tensor, *arguments: Any) -> Tensor:
        y = launch(library, x, *arguments)
        return y * 7 if x.shape[-1] == 2 * WIDTH else y

    if nm_select.cpu_library() is None:
        pytest.skip("no C++ compiler: the reference is the kernel")
    launch = nm_select.launch
    monkeypatch.setattr(nm_select, "launch", wrong)
    found = bisect(Deep(wide=6), X, bound=0.1, compiler=None, **DOWN)
    assert found.blamed == "kernels"
    assert [one.name for one in found.sites] == [site(6)]


def test_a_pass_that_fuses_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing fuses, so a rule that always says yes stands for a GPU."""
    module = importlib.import_module("amber_compile.passes.fuse_projections")

    def fuse(gm: GraphModule, *arguments: Any) -> int:
        fused: int = module.fuse_projections(gm, *arguments, why_separate=lambda *_: None)
        for node in gm.graph.find_nodes(
            op="call_function", target=torch.ops.amber.nm_linear.default
        ):
            if node.args[0].meta["example_value"].shape[-1] == 2 * WIDTH:
                node.update_arg(4, 1)  # of four channels one is kept, not two
        gm.recompile()
        return fused

    monkeypatch.setattr("amber_compile.rewritten.fuse_projections", fuse)
    found = bisect(Deep(wide=3), X, bound=0.005, compiler=None, **DOWN | {"pattern": "4:4"})
    assert [step.name for step in found.steps] == ["method", "kernels", "fuse_projections"]
    assert found.blamed == "fuse_projections"
    assert [step.error for step in found.steps[:2]] == [0, 0]  # taken apart, it is right
    assert [one.name for one in found.sites] == [site(3)]


def test_a_cache_is_the_same_in_every_run() -> None:
    model, inputs = ZOO["llama"].build()
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    found = bisect(
        model,
        kwargs={**inputs, "past_key_values": cache},
        bound=0.001,
        compiler=None,
        pattern="4:4",
    )
    assert found.error == 0
    assert [step.error for step in found.steps] == [0, 0]
    assert int(cache.get_seq_length()) == 32


# ---- miscompiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_a_compiler_that_gets_one_site_wrong(value: float) -> None:
    compiler = spoiling(lambda gm: selects(gm, 2 * WIDTH), value)
    found = bisect(Deep(wide=2), X, bound=0.2, compiler=compiler, **DOWN)
    assert found.blamed == "code generation"
    assert [step.error > 0.2 for step in found.steps[:2]] == [False, False]
    assert [one.name for one in found.sites] == [site(2)]


def test_a_compiler_that_fails_on_one_site() -> None:
    def compiler(
        gm: GraphModule, inputs: Sequence[Any], config: AmberConfig, rewritten: bool
    ) -> Any:
        if selects(gm, 2 * WIDTH):
            raise NotImplementedError("so wide")
        return gm.forward

    found = bisect(Deep(wide=7), X, bound=0.2, compiler=compiler, **DOWN)
    assert found.blamed == "code generation"
    assert found.error == math.inf
    assert found.steps[-1].failure == "NotImplementedError: so wide"
    assert "so wide" in str(found)
    assert [one.name for one in found.sites] == [site(7)]


def test_a_compiler_that_gets_the_dense_graph_wrong_too() -> None:
    found = bisect(Deep(), X, bound=0.2, compiler=spoiling(lambda gm: True), **DOWN)
    assert found.blamed == "code generation"
    assert found.sites == found.contributions == []
    assert found.dense is not None
    assert found.dense > 0.2
    assert "with every site dense the error is" in found.verdict


# ---- around it -----------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    model = Deep()
    before = [one._version for one in model.parameters()]
    bisect(model, X, bound=0.5, compiler=None, **DOWN)
    assert last_reports() == []
    assert [one._version for one in model.parameters()] == before


@pytest.mark.parametrize("bound", [-1, math.inf, math.nan, "0.1", True])
def test_a_bound_is_a_number(bound: Any) -> None:
    with pytest.raises(OptionError, match=r"bound=.* must be a number >= 0"):
        bisect(Deep(), X, bound=bound)


def test_what_cannot_be_bisected_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"bisect takes a torch.nn.Module, not int"):
        bisect(3, X, bound=1)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(OptionError, match="did you mean 'pattern'"):
        bisect(Deep(), X, bound=1, patern="2:4")
