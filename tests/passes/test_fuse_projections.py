"""Fuse selections with the projections that read them: programs before and after."""

import sys
from dataclasses import replace

import pytest
import torch
from programs import PLAIN, B, Q, W, X, sparsify
from torch.nn.functional import linear

from amber_compile import Decision, Pattern, Settings
from amber_compile.decision import sparse
from amber_compile.kernels import nm_linear, nm_quantized_linear, nm_select
from amber_compile.passes import (
    find_projections,
    fuse_projections,
    quantize_projections,
    sparsify_projections,
)
from amber_compile.passes.fuse_projections import why_separate
from amber_compile.passes.quantize_projections import products_of
from amber_compile.plan_tensors import PlanTensors
from amber_compile.projection import Projection
from amber_compile.quantization import Quantization

NORM = Settings(Pattern(2, 4), "magnitude", "norm", dense_prefix=3)


def fuse(settings, reason=None, **arguments):
    """Return a pass that sparsifies every projection, then fuses it unless there is a reason."""
    chosen = settings if isinstance(settings, list) else [settings]

    def rewrite(gm):
        done = sparsify(settings, **arguments)(gm)
        each = chosen if len(chosen) == len(done.sites) else chosen * len(done.sites)
        rewrite.fused = fuse_projections(gm, done.sites, each, lambda *_: reason)
        return done

    return rewrite


def test_a_selection_and_its_projection_become_one(assert_rewrites):
    def before(x, w, b):
        return linear(x, w, b)

    def after(x, w, b):
        return nm_linear(x, w, b, None, 2, 4)

    rewrite = fuse(PLAIN)
    assert_rewrites(rewrite, before, after, X, W, B, sites=1)
    assert rewrite.fused == 1


def test_everything_in_the_settings_reaches_the_operator(assert_rewrites):
    def before(x, w):
        return linear(input=x, weight=w)

    def after(x, w):
        return nm_linear(x, w, None, None, 2, 4, "norm", 3, 32)

    assert_rewrites(fuse(NORM, min_rows=[32]), before, after, X, W, sites=1)


def test_a_factor_stays_an_input(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w, factor):
        return nm_linear(x, w, None, factor, 2, 4)

    assert_rewrites(fuse(Settings(Pattern(2, 4), "weight_norm")), before, after, X, W, sites=1)


def test_two_projections_of_one_selection_compress_it_twice(assert_rewrites):
    def before(x, w, q):
        return linear(x, w), linear(x, q)

    def after(x, w, q):
        return nm_linear(x, w, None, None, 2, 4), nm_linear(x, q, None, None, 2, 4)

    assert_rewrites(fuse(PLAIN), before, after, X, W, Q, sites=2)


def test_with_a_reason_nothing_is_fused(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w):
        return linear(nm_select(x, None, 2, 4), w)

    rewrite = fuse(PLAIN, reason="no sparse unit")
    assert_rewrites(rewrite, before, after, X, W, sites=1)
    assert rewrite.fused == 0


def test_a_selection_seen_through_a_reshape_stays(assert_rewrites):
    def before(x, w):
        return linear(x.view(-1, 16), w)

    def after(x, w):
        flat = x.view(-1, 16)
        return linear(nm_select(flat.view_as(x), None, 2, 4, "norm", 3).view_as(flat), w)

    rewrite = fuse(NORM)
    assert_rewrites(rewrite, before, after, X, W, sites=1)
    assert rewrite.fused == 0


# ---- the rule ----


def site(function, x, weight, **changes):
    """Return the only projection of ``function(x, weight)``, traced on tensors of any device."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "w")]
    for node, value in zip(nodes, (x, weight), strict=True):
        node.meta["example_value"] = value
    call = graph.call_function(function, tuple(nodes), changes)
    call.meta["example_value"] = function(x, weight, **changes)
    return Projection("site", call, *nodes, tuple(weight.shape), False, function.__name__)


@pytest.fixture
def cuda():
    """Fake CUDA tensors, on a machine without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda")


def test_a_cpu_has_no_sparse_unit():
    x, w = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    assert why_separate(site(linear, x, w), PLAIN) == "no sparse unit on device 'cpu'"


@pytest.mark.parametrize(
    ("reason", "shapes", "dtypes", "settings"),
    [
        ("4:8 has no sparse unit", ((4, 64), (8, 64)), (), Settings(Pattern(4, 8))),
        ("torch.float32 has no sparse unit", ((4, 64), (8, 64)), (torch.float32,) * 2, PLAIN),
        ("K = 96 is not a multiple of 64", ((4, 96), (8, 96)), (), PLAIN),
        ("N = 12 is not a multiple of 8", ((4, 64), (12, 64)), (), PLAIN),
        (
            "the variance correction",
            ((4, 64), (8, 64)),
            (),
            Settings(Pattern(2, 4), "magnitude", "variance"),
        ),
        ("dense_prefix of a flattened input", ((4, 64), (8, 64)), (), NORM),
        ("[16, 64] is too small", ((4, 64), (16, 64)), (), PLAIN),
        (None, ((4, 64), (8, 64)), (), PLAIN),
        (None, ((2, 4, 64), (8, 64)), (), NORM),
    ],
)
def test_what_a_sparse_unit_does_not_take(monkeypatch, cuda, reason, shapes, dtypes, settings):
    module = sys.modules["amber_compile.kernels.nm_linear"]
    monkeypatch.setattr(module, "why_no_sparse_product", lambda device, kind: None)
    monkeypatch.setattr(module, "_crossover", lambda x, w: None if w.shape[0] == 16 else 8)
    types = dtypes or (torch.bfloat16,) * 2
    x, w = (cuda(*shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True))
    found = why_separate(site(linear, x, w), settings)
    assert found == reason if reason is None else reason in found


def test_a_matmul_of_another_spelling_stays(cuda):
    found = why_separate(site(torch.matmul, cuda(4, 64), cuda(64, 8)), PLAIN)
    assert found == "matmul has no sparse kernel"


# ---- corrected and quantised outputs ----


def corrected(**flags):
    """Return the pass that sparsifies and corrects every projection, then fuses it."""
    settings = Settings(Pattern(2, 4), "magnitude", **flags)

    def rewrite(gm):
        decided = [(one, sparse(settings)) for one in find_projections(gm)]
        held = {"output_scale": ALPHA, "output_bias": BETA}
        tensors = PlanTensors({one.name: held for one, _ in decided})
        done = sparsify_projections(gm, decided, tensors=tensors)
        fuse_projections(gm, done.sites, [settings] * len(done.sites), lambda *_: None)
        return done

    return rewrite


ALPHA, BETA = torch.rand(8) + 0.5, torch.randn(8)


def test_an_output_scale_and_bias_enter_the_epilogue(assert_rewrites):
    def before(x, w, b):
        return linear(x, w, b).relu()

    def after(x, w, b, alpha, beta):
        return nm_linear(x, w, b, None, 2, 4, None, 0, 0, alpha, beta).relu()

    rewrite = corrected(output_scale=True, output_bias=True)
    assert_rewrites(rewrite, before, after, X, W, B, sites=1)


def test_an_output_bias_alone(assert_rewrites):
    def before(x, w):
        return linear(x, w)

    def after(x, w, beta):
        return nm_linear(x, w, None, None, 2, 4, None, 0, 0, None, beta)

    assert_rewrites(corrected(output_bias=True), before, after, X, W, sites=1)


def test_what_a_model_multiplies_by_itself_stays(assert_rewrites):
    """No cast follows, so it is not the epilogue of a correction."""

    def before(x, w, b):
        return linear(x, w) * b

    def after(x, w, b):
        return nm_linear(x, w, None, None, 2, 4) * b

    assert_rewrites(fuse(PLAIN), before, after, X, W, B, sites=1)


def test_a_quantised_projection_becomes_one_operator(assert_rewrites):
    settings = Settings(Pattern(2, 4), "magnitude", "norm", dense_prefix=1)
    decision = Decision(settings=settings, quantization=Quantization("fp8"))

    def rewrite(gm):
        decided = [(one, decision) for one in find_projections(gm)]
        done = sparsify_projections(gm, decided)
        moved = quantize_projections(gm, products_of(decided, {}), done.inputs)
        done.sites = [(replace(site, node=moved[site.node]), read) for site, read in done.sites]
        fuse_projections(gm, done.sites, [settings], lambda *_: None)
        return done

    def before(x, w, b):
        return linear(x, w, b)

    def after(x, w, b, w8, scale):
        how = "fp8", "norm", 1, 0, torch.float32
        return nm_quantized_linear(x, None, None, w8, scale, b, 2, 4, *how)

    assert_rewrites(rewrite, before, after, X, W, B, sites=1)
