"""The backend where a sparse matrix unit takes every projection: pretended, with the real nodes."""

import sys

import pytest
import torch
from torch import nn

import amber_compile

OPTIONS = {"projections": ["*"], "preset": "amber"}


class Mlp(nn.Module):
    """What Dynamo shows of a gated MLP: three projections, two of one input."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(64, 96)
        self.up_proj = nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def sparse_unit(monkeypatch):
    """Pretend that a sparse unit takes every linear."""
    fuse = sys.modules["amber_compile.passes.fuse_projections"]
    monkeypatch.setattr(fuse, "why_masked", lambda *_: None)
    monkeypatch.setattr("amber_compile.analysis.kernel_of", lambda *_: "nm_linear, pretended")


def run(x, backend="amber_eager", **options):
    torch.manual_seed(0)
    model = Mlp()
    model.compile(backend=backend, options=OPTIONS | options)
    with torch.inference_mode():
        return model(x), amber_compile.last_reports()[-1]


@pytest.mark.parametrize("options", [{}, {"correction": None}, {"pattern": "4:8"}])
def test_a_fused_graph_computes_the_same(monkeypatch, request, options):
    x = torch.randn(2, 5, 64)
    apart, _ = run(x, **options)
    request.getfixturevalue("sparse_unit")
    torch._dynamo.reset()
    fused, report = run(x, **options)
    assert torch.equal(fused, apart)
    assert {site.kernel for site in report.sites} == {"nm_linear, pretended"}
    assert report.graphs[0].rewritten == 3


def test_the_stages_show_both_passes(sparse_unit):
    _, report = run(torch.randn(2, 5, 64))
    (graph,) = report.graphs
    assert [stage.name for stage in graph.stages] == [
        "traced",
        "sparsify_projections",
        "fuse_projections",
    ]


def test_a_check_still_measures_every_site(sparse_unit):
    _, report = run(torch.randn(2, 5, 64), check=True)
    assert all(0 < site.error < 1 for site in report.sites)
    assert 0 < report.graphs[0].output_error < 1


def test_a_fused_graph_goes_through_inductor(inductor, sparse_unit):
    x = torch.randn(2, 5, 64)
    eager, _ = run(x)
    torch._dynamo.reset()
    compiled, report = run(x, "amber")
    assert report.graphs[0].fallback is None
    torch.testing.assert_close(compiled, eager)
