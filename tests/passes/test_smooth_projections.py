"""Fold smooth vectors: programs before and after, and programs that stay as they are."""

import pytest
import torch
from programs import K, Q, X
from torch import nn
from torch.nn.functional import layer_norm, linear, rms_norm

from amber_compile.decision import Decision
from amber_compile.derivations import Calibrated, ScaledVector, WeightScale
from amber_compile.graph import copy_graph
from amber_compile.kernels import nm_select, quantize_rows, quantized_linear
from amber_compile.passes import find_projections, quantize_projections, sparsify_projections
from amber_compile.passes.quantize_projections import products_of
from amber_compile.passes.smooth_projections import KERNEL, smooth_projections
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization
from amber_compile.settings import Settings

FP32 = torch.float32
GAIN, SHIFT, OUT = (nn.Parameter(torch.randn(16)) for _ in range(3))
UP = nn.Parameter(torch.randn(16, 16))
ONE, OTHER = torch.rand(16) + 0.5, torch.rand(16) + 0.5
DENSE = Decision(reason="rule", quantization=Quantization("int8", "smoothquant"))
PLAIN = Decision(reason="rule", quantization=Quantization("int8"))
SPARSE = Decision(settings=Settings("2:4", "magnitude"), quantization=DENSE.quantization)
WIDE = Decision(reason="rule", unquantized="skipped")


def fold(*vectors: torch.Tensor | None, decisions=(), places: list[str] | None = None, on=True):
    """Return the pass under which projection ``i`` has ``vectors[i]``; ``places`` gets words."""

    def run(gm):
        found = find_projections(gm)
        chosen = decisions or [PLAIN if vector is None else DENSE for vector in vectors]
        pairs = zip(found, vectors, strict=True)
        held = PlanTensors({one.name: {"smooth": v} for one, v in pairs if v is not None})

        def same(name: str, one: str, other: str) -> bool:
            return torch.equal(held.get(one, name), held.get(other, name))

        decided = list(zip(found, chosen, strict=True))
        done = sparsify_projections(gm, decided, tensors=held)
        quantize_projections(gm, products_of(decided, done.halves), done.inputs, held, same)
        told = smooth_projections(gm, done.inputs, same, fold=on)
        if places is not None:
            places.extend(told.values())
        return done

    return run


def scaled(vector: torch.Tensor, smooth: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    return (vector.detach() + offset) * smooth


# ---- a norm ----


def test_the_weight_of_a_norm_and_one_vector_for_all_that_read_it(assert_rewrites):
    def before(x, g, q, k):
        x = g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))
        return linear(x, q), linear(x, k)

    def after(x, g, q, k, q8, q_scale, k8, k_scale, gain):
        x = gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))
        codes, scale = quantize_rows(x, None, "int8")
        y = quantized_linear(codes, scale, q8, q_scale, None, FP32)
        return y, quantized_linear(codes, scale, k8, k_scale, None, FP32)

    places = []
    run = fold(ONE, ONE.clone(), places=places)
    done = assert_rewrites(run, before, after, X, GAIN, Q, K, sites=0)
    (request,) = [one.request for one in done.inputs.requests if one.weight.name == "l_g_"]
    assert isinstance(request, ScaledVector)
    assert torch.equal(request.compute(GAIN), scaled(GAIN, ONE))
    assert not any(isinstance(one.request, Calibrated) for one in done.inputs.requests)
    assert len(places) == 1
    assert places[0].startswith("folded into")


def test_one_more_than_the_weight_in_fp32(assert_rewrites):
    x, g, w = X.bfloat16(), GAIN.detach().bfloat16(), Q.detach().bfloat16()
    g, w = nn.Parameter(g), nn.Parameter(w)

    def before(x, g, w):
        return linear((x.float() * (1.0 + g.float())).type_as(x), w)

    def after(x, g, w, codes, scale, gain):
        rows, row_scale = quantize_rows((x.float() * gain).type_as(x), None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, torch.bfloat16)

    done = assert_rewrites(fold(ONE), before, after, x, g, w, sites=0)
    request = done.inputs.requests[-1].request
    assert torch.equal(request.compute(g), scaled(g.float(), ONE, 1.0))
    assert request.compute(g).dtype == FP32


def test_weight_and_bias_of_a_layer_norm(assert_rewrites):
    def before(x, g, b, w):
        return linear(layer_norm(x, (16,), g, b, 1e-5), w)

    def after(x, g, b, w, codes, scale, gain, shift):
        x = layer_norm(x, (16,), gain, shift, 1e-5)
        rows, row_scale = quantize_rows(x, None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    done = assert_rewrites(fold(ONE), before, after, X, GAIN, SHIFT, Q, sites=0)
    assert torch.equal(done.inputs.requests[-1].request.compute(SHIFT), scaled(SHIFT, ONE))


def test_torchs_own_rms_norm(assert_rewrites):
    def before(x, g, w):
        return linear(rms_norm(x, (16,), g, 1e-6), w)

    def after(x, g, w, codes, scale, gain):
        rows, row_scale = quantize_rows(rms_norm(x, (16,), gain, 1e-6), None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    assert_rewrites(fold(ONE), before, after, X, GAIN, Q, sites=0)


def test_a_product_and_a_sum_and_a_view(assert_rewrites):
    def before(x, g, b, w):
        return linear((x * g + b).view(-1, 16), w)

    def after(x, g, b, w, codes, scale, gain, shift):
        rows, row_scale = quantize_rows((x * gain + shift).view(-1, 16), None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    assert_rewrites(fold(ONE), before, after, X, GAIN, SHIFT, Q, sites=0)


def test_a_weight_that_two_norms_share_stays_itself_for_the_other(assert_rewrites):
    def before(x, g, q, k):
        return linear(x * g, q), linear(x.relu() * g, k)

    def after(x, g, q, k, q8, q_scale, k8, k_scale, gain):
        codes, scale = quantize_rows(x * gain, None, "int8")
        y = quantized_linear(codes, scale, q8, q_scale, None, FP32)
        codes, scale = quantize_rows(x.relu() * g, None, "int8")
        return y, quantized_linear(codes, scale, k8, k_scale, None, FP32)

    assert_rewrites(fold(ONE, None), before, after, X, GAIN, Q, K, sites=0)


# ---- a projection ----


def test_the_scales_and_the_bias_of_the_projection_before(assert_rewrites):
    def before(x, u, b, w):
        return linear(x.relu() * linear(x, u, b), w)

    def after(x, u, b, w, u8, codes, scale, u_scale, shift):
        gate = x.relu()
        rows, row_scale = quantize_rows(x, None, "int8")
        up = quantized_linear(rows, row_scale, u8, u_scale, shift, FP32)
        rows, row_scale = quantize_rows(gate * up, None, "int8")
        return quantized_linear(rows, row_scale, codes, scale, None, FP32)

    places = []
    done = assert_rewrites(fold(None, ONE, places=places), before, after, X, UP, OUT, Q, sites=0)
    (request,) = [one.request for one in done.inputs.requests if _has_outputs(one.request)]
    plain = WeightScale(request.quantized).compute(UP)
    assert torch.equal(request.compute(UP), plain * ONE)
    assert torch.equal(done.inputs.requests[-1].request.compute(OUT), scaled(OUT, ONE))
    assert places[0].startswith("folded into the scales of")


def _has_outputs(request: object) -> bool:
    return isinstance(request, WeightScale) and request.outputs != ()


# ---- nothing is folded ----


@pytest.fixture
def stays(capture):
    """Return a check that nothing is folded in the graph of a function; it returns why."""

    def check(function, *inputs, vectors, decisions=(), on=True) -> str:
        gm, _ = capture(function, *inputs)
        copy, _ = copy_graph(gm)
        places: list[str] = []
        done = fold(*vectors, decisions=decisions, places=places, on=on)(copy)
        assert not any(
            isinstance(one.request, ScaledVector) or _has_outputs(one.request)
            for one in done.inputs.requests
        )
        nodes = copy.graph.find_nodes(
            op="call_function", target=torch.ops.amber.quantize_rows.default
        )
        assert sum(node.args[1] is not None for node in nodes) == len(places)
        assert all(place.startswith(KERNEL) for place in places)
        return places[0].removeprefix(KERNEL).removeprefix(": ")

    return check


def test_unless_asked(stays):
    assert stays(lambda x, g, w: linear(x * g, w), X, GAIN, Q, vectors=[ONE], on=False) == ""


def test_another_reader(stays):
    def read(x, g, w):
        x = x * g
        return linear(x, w), x.sum()

    assert stays(read, X, GAIN, Q, vectors=[ONE]) == "sum reads its input too"


def test_an_output_of_the_graph(stays):
    def given(x, g, w):
        x = x * g
        return linear(x, w), x

    assert stays(given, X, GAIN, Q, vectors=[ONE]) == "the graph's output reads its input too"


def test_a_reader_in_16_bit(stays):
    def both(x, g, q, k):
        x = x * g
        return linear(x, q), linear(x, k)

    reason = stays(both, X, GAIN, Q, K, vectors=[ONE, None], decisions=(DENSE, WIDE))
    assert reason == "linear reads its input too"


def test_a_selection_compares_what_is_not_smoothed(stays):
    def both(x, g, q, k):
        x = x * g
        return linear(x, q), linear(x, k)

    reason = stays(both, X, GAIN, Q, K, vectors=[ONE, ONE], decisions=(DENSE, SPARSE))
    assert reason == "nm_select reads its input too"
    alone = stays(lambda x, g, w: linear(x * g, w), X, GAIN, Q, vectors=[ONE], decisions=(SPARSE,))
    assert alone == "its input comes from nm_select"
    assert nm_select is not None


def test_vectors_that_differ(stays):
    def both(x, g, q, k):
        x = x * g
        return linear(x, q), linear(x, k)

    differ = "projections of the same input have other vectors"
    assert stays(both, X, GAIN, Q, K, vectors=[ONE, OTHER]) == differ
    assert stays(both, X, GAIN, Q, K, vectors=[ONE, None]) == differ


def test_what_is_written_to(stays):
    def written(x, g, w):
        x = x * g
        y = linear(x, w)
        x.add_(1)
        return y

    reason = stays(written, X, GAIN, Q, vectors=[ONE])
    assert reason == "its input is written to"


def test_float16_might_overflow(stays):
    x, g, w = (nn.Parameter(one.detach().half()) for one in (X, GAIN, Q))
    reason = stays(lambda x, g, w: linear(x * g, w), x.detach(), g, w, vectors=[ONE])
    assert reason == "float16 might overflow"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, g, w: linear(x.relu(), w), "its input comes from relu"),
        (lambda x, g, w: linear(x + x.relu(), w), "its input comes from add"),
        (lambda x, g, w: linear(x * g.exp(), w), "its input comes from exp"),
        (lambda x, g, w: linear(x * 2, w), "its input comes from an input of the graph"),
        (lambda x, g, w: linear((x * g).relu(), w), "its input comes from relu"),
        (lambda x, g, w: linear(layer_norm(x, (16,)), w), "its norm has no weight of its own"),
        (
            lambda x, g, w: linear(layer_norm(x, (16,), g.exp()), w),
            "its norm has no weight of its own",
        ),
        (lambda x, g, w: linear(x.transpose(1, 2).reshape(2, 4, 16), w), "its input comes from "),
        (lambda x, g, w: linear((x[:, 0] * g).view(2, 8, 2).view(2, 16), w), "its input comes"),
    ],
)
def test_what_is_no_product_with_a_parameter(stays, function, reason):
    assert stays(function, X, GAIN, Q, vectors=[ONE]).startswith(reason)


def test_a_factor_that_something_else_reads(stays):
    def twice(x, u, w):
        up = linear(x, u)
        return linear(x.relu() * up, w), up

    reason = stays(twice, X, UP, Q, vectors=[None, ONE])
    assert reason == "another node reads quantized_linear"


def test_a_factor_in_16_bit(stays):
    def factors(x, u, w):
        return linear(x.relu() * linear(x, u), w)

    reason = stays(factors, X, UP, Q, vectors=[None, ONE], decisions=(WIDE, DENSE))
    assert reason == "its input comes from linear"
