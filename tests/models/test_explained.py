"""Explaining every model of the zoo: each linear once, with what was written down by hand."""

import subprocess
import sys

import pytest
import torch
from expected import EXPECTED, GATE, SPARSE
from zoo import ZOO

from amber_compile import Report
from amber_compile.explain import explain

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"  # transformers' MoE
)

STOPS = {"mixtral_eager"}
"""Models that Python runs in part, by values that a meta tensor does not have."""


def check_outcomes(report: Report, expected: dict[str, str]) -> None:
    """Compare a report with what was written down by hand."""
    assert sorted(site.name for site in report.sites) == sorted(expected)
    for site in report.sites:
        if expected[site.name] in (SPARSE, GATE):
            assert site.decision.settings, (site.name, site.decision.reason)
            assert site.decision.settings.part == ("gate" if expected[site.name] == GATE else None)
        else:
            assert expected[site.name] in (site.decision.reason or ""), site.name


@pytest.mark.parametrize("name", sorted(set(ZOO) - STOPS))
def test_every_linear_of_a_meta_model_is_listed_once(name: str) -> None:
    with torch.device("meta"):
        model, inputs = ZOO[name].build()
    report = explain(model, kwargs=inputs)
    check_outcomes(report, dict(EXPECTED[name]))
    assert report.breaks == report.outside == []
    assert [graph.phase for graph in report.graphs] == ["prefill"]


@pytest.mark.parametrize("name", ["llama_tied", "mixtral_eager"])
def test_every_linear_of_a_model_with_values_is_listed_once(name: str) -> None:
    model, inputs = ZOO[name].build()
    report = explain(model, kwargs=inputs, device="cuda")
    check_outcomes(report, dict(EXPECTED[name]))
    assert bool(report.breaks) == (name == "mixtral_eager")


def test_a_meta_model_that_asks_for_values_is_explained_up_to_there() -> None:
    with torch.device("meta"):
        model, inputs = ZOO["mixtral_eager"].build()
    report = explain(model, kwargs=inputs)
    found = {site.name: site.decision.reason for site in report.sites}
    assert sorted(found) == sorted(EXPECTED["mixtral_eager"])
    assert found["model.layers.0.self_attn.q_proj"] is None
    assert found["model.layers.1.self_attn.q_proj"] == (
        "no graph reads its weight before tracing stopped"
    )
    assert "tracing stopped half-way: aten.nonzero" in report.explained


LARGE = """
import torch, transformers
from amber_compile import explain

sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 8}
heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
config = transformers.AutoConfig.for_model("llama", **sizes, **heads)
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
report = explain(model, torch.empty(1, 2048, dtype=torch.long, device="meta"))
weights = sum(parameter.nbytes for parameter in model.parameters())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(weights, len(report.sites), 1024 * int(status["VmHWM"].split()[0]))
"""


def test_a_large_model_takes_the_memory_of_its_shapes() -> None:
    """Eight layers of the width of Llama 3.1 70B, in a process of its own.

    ``ru_maxrss`` would do for no child: it starts from what the parent once took.
    """
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, sites, peak = map(int, done.stdout.split())
    assert weights > 17e9
    assert sites == 8 * 7 + 1
    assert peak < 2e9
