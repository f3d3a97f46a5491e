"""Every model of the zoo under W8A8: which projections are quantised, and what comes out."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from emulate import Settings, sparsified
from emulate_w8a8 import quantized
from expected import EXPECTED, GATE, HEAD, NEVER, ROUTER, SPARSE
from zoo import ZOO

from amber_compile import last_reports, register_model
from amber_compile.report import Report, clear_reports

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"  # transformers' MoE
)
PAPER = {"preset": "paper", "quantize": "int8"}


@pytest.fixture(scope="module", params=ZOO)
def run(request):
    """Run one model with W8A8 and 2:4 as the paper has it; return all there is to ask about."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    clear_reports()
    model, inputs = ZOO[request.param].build()
    register_model(model)
    compiled = torch.compile(model, backend="amber_eager", options=PAPER)
    with torch.no_grad():
        logits = compiled(**inputs).logits
    return request.param, model, inputs, logits, Report.merge(last_reports())


def is_matrix(model, name):
    """Whether a projection is a module of its own, as all but grouped experts are."""
    return name in dict(model.named_modules())


def test_all_but_heads_routers_and_grouped_experts_are_quantised(run):
    name, model, _, _, report = run
    found = {site.name for site in report.sites if site.decision.quantization}
    never = NEVER.get(name, "")
    assert found == {
        site
        for site, outcome in EXPECTED[name].items()
        if outcome not in (HEAD, ROUTER) and is_matrix(model, site) and not fnmatchcase(site, never)
    }


def test_the_others_say_why_not(run):
    _, _, _, _, report = run
    for site in report.sites:
        assert (site.decision.quantization is None) == bool(site.decision.unquantized), site.name


def test_the_output_is_that_of_the_emulation_bit_for_bit(run):
    name, model, inputs, logits, report = run
    robust = Settings(2, 4, "robust_norm")
    halves = Settings(2, 4, "robust_norm", part="gate")
    routed = Settings(2, 4, "weight_norm")
    routed_halves = Settings(2, 4, "weight_norm", part="gate")
    sparse = {
        site: (routed_halves if outcome == GATE else routed)
        if "experts" in site.split(".")
        else (halves if outcome == GATE else robust)
        for site, outcome in EXPECTED[name].items()
        if outcome in (SPARSE, GATE)
    }
    names = [site.name for site in report.sites if site.decision.quantization]
    with torch.no_grad(), sparsified(model, sparse), quantized(model, names):
        expected = model(**inputs).logits
    assert torch.equal(logits, expected)
