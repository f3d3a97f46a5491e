"""What reports, checks and the page say of quantised projections, in models that run."""

import pytest
import torch
from stack import Stack
from torch.nn.functional import linear
from zoo import ZOO

from amber_compile import bisect, check, explain
from amber_compile.cost import cost_of
from amber_compile.derivations import Matrix, Quantized, WeightCodes, WeightScale
from amber_compile.kernels import quantize_rows, quantized_linear
from amber_compile.kernels.int8_kernel import int8_kernel
from amber_compile.kernels.prepared_weight import prepare_weight
from amber_compile.page.sources import kernel_sources
from amber_compile.plan import Plan
from amber_compile.quantization import Quantization
from amber_compile.rebuild import rebuilt
from amber_compile.weight_codes import quantize_weight

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
DENSE = {"quantize": "int8", "projections": ()}


def test_check_measures_quantised_products_against_dense_ones():
    stack = Stack()
    report = check(stack, X, **DENSE)
    weight = stack.layers[0].gate_proj.weight.detach()
    codes, scale = quantize_weight(weight, "int8")
    rows, row_scale = quantize_rows(X, None, "int8")
    found = quantized_linear(rows, row_scale, prepare_weight(codes), scale, None, torch.float32)
    dense = linear(X, weight)
    error = ((dense - found).double().norm() / dense.double().norm()).item()
    (site,) = [site for site in report.sites if site.name == "layers.0.gate_proj"]
    assert site.error == pytest.approx(error, rel=1e-6)
    assert 0 < site.error < 0.02
    assert all(0 < site.error < 0.05 for site in report.sites)
    assert "dense; int8" in str(report)


@pytest.mark.parametrize("name", ["llama_biased", "phi3", "gpt2"])
def test_every_quantised_product_of_a_model_is_measured(name):
    model, inputs = ZOO[name].build()
    report = check(model, kwargs=inputs, quantize="int8", decode="int8")
    measured = {site.name for site in report.sites if site.error is not None}
    assert measured == {site.name for site in report.sites if site.decision.quantization}
    dense = [site for site in report.worst(99) if not site.decision.sparse]
    assert all(0 < site.error < 0.05 for site in dense)


def test_bisect_knows_quantised_sites():
    found = bisect(Stack(), X, bound=1e-6, **DENSE)
    assert "method" in str(found)
    assert found.sites or found.contributions


def test_kernels_of_a_cpu_and_their_sources():
    report = explain(Stack(), X, device="cpu", quantize="int8")
    names = {site.name: site.kernel for site in report.sites}
    assert names["layers.0.up_proj"] == f"quantize_rows, {int8_kernel()}"
    assert names["layers.0.down_proj"] == f"nm_quantize, {int8_kernel()}"
    if int8_kernel() != "reference":
        (one, other) = kernel_sources(report.sites)
        files = ["kernels/cpu/nm_quantize.cpp", "kernels/cpu/int8_gemm.cpp"]
        assert [source.name for source in one.sources] == files
        assert [source.name for source in other.sources] == files


def test_fp8_is_emulated_on_a_cpu_and_the_report_says_so():
    report = explain(Stack(), X, device="cpu", quantize="fp8")
    assert "fp8 is emulated on a CPU" in str(report)


def test_a_gpu_with_a_sparse_unit_is_asked_in_eight_bits():
    model, inputs = ZOO["llama_bf16"].build()
    report = explain(model, kwargs=inputs, device="cuda", capability=(9, 0), quantize="int8")
    (down,) = [one for one in report.sites if one.name == "model.layers.0.mlp.down_proj"]
    assert down.kernel.startswith("nm_quantize, ")
    assert "K = 96 is not a multiple of 64" in down.kernel


def test_the_page_has_a_column_of_formats(tmp_path):
    for options, shown in ((DENSE, True), ({}, False)):
        path = tmp_path / "page.html"
        explain(Stack(), X, device="cpu", **options).to_html(path)
        text = path.read_text("utf-8")
        assert ('data-key="text">format</th>' in text) == shown
        assert ("projections in 8 bits" in text) == shown


def test_the_cost_of_a_report_counts_eight_bits():
    report = explain(Stack(), X, device="cpu", **DENSE)
    assert {
        group.sites[0].decision.quantization for group in cost_of(report, "H100 SXM").groups
    } == {Quantization("int8")}


def test_a_plan_of_a_report_quantises_again(tmp_path):
    stack = Stack()
    report = explain(stack, X, device="cpu", quantize="int8", quantize_skip="*.up_proj")
    report.plan().save(tmp_path / "plan.json")
    again = explain(stack, X, device="cpu", plan=Plan.load(tmp_path / "plan.json"))
    assert [one.decision.quantization for one in again.sites] == [
        one.decision.quantization for one in report.sites
    ]
    (up,) = {one.decision.unquantized for one in again.sites if one.name.endswith("up_proj")}
    assert up == "plan: quantize_skip='*.up_proj'"


# ---- what is kept of a released weight ----


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_halves_and_wholes_follow_from_each_other(dtype, transposed):
    weight = torch.randn(70, 64)
    stored = weight.T.contiguous() if transposed else weight
    parts = [Matrix(transposed), Matrix(transposed, 0, 35), Matrix(transposed, 35)]
    whole, first, second = (Quantized(Quantization(dtype), part) for part in parts)

    def kept(*made: Quantized) -> dict:
        wanted = [kind(one) for one in made for kind in (WeightCodes, WeightScale)]
        return {one: one.compute(stored) for one in wanted}

    for have, want in (((first, second), whole), ((whole,), first), ((whole,), second)):
        for kind in (WeightCodes, WeightScale):
            found = rebuilt(stored, kind(want), kept(*have))
            assert torch.equal(found.float(), kind(want).compute(stored).float())
    assert rebuilt(stored, WeightCodes(whole), kept(first)) is None
    other = Quantized(Quantization("fp8" if dtype == "int8" else "int8"), parts[0])
    assert rebuilt(stored, WeightCodes(other), kept(whole)) is None
