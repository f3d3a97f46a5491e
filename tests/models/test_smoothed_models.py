"""Folded smooth vectors compute what the quantise kernels would, in models of many architectures.

In a graph whose codes round nothing (smooth.py) both ways are the same function of real numbers.
Folding may cost what the graph's own rounding costs, and no more: the budget is twice the error of
the graph that is not folded, both against float64.
"""

import pytest
import torch
from smooth import analyse, both, run, smoothed
from torch import Tensor
from zoo import ZOO

from amber_compile.passes.smooth_projections import FOLDED, KERNEL

INTO_NORMS = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}
EXPECTED = {
    "llama_biased": INTO_NORMS | {"down_proj": "the scales of up_proj"},
    "gemma2": {"q_proj": "input_layernorm", "up_proj": "pre_feedforward_layernorm"},
    "cohere": {"q_proj": "input_layernorm", "gate_proj": "input_layernorm"},
    "phi3": {"qkv_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm"},
    "opt": {"q_proj": "self_attn_layer_norm", "fc1": "final_layer_norm"},
}
NOT_FOLDED = {"opt": "fc2", "llama_biased": "o_proj", "phi3": "down_proj"}


@pytest.mark.parametrize("name", [*EXPECTED, "llama_bf16"])
def test_folding_costs_no_more_than_rounding(name):
    model, inputs = ZOO[name].build()
    plan = smoothed(model, inputs)
    given = analyse(model, inputs, plan=plan).inputs
    plain, folded = both(model, inputs, plan)
    exact = _floats(run(plain, given, wide=True))
    wanted, found = _floats(run(plain, given)), _floats(run(folded, given))
    for truth, one, other in zip(exact, wanted, found, strict=True):
        own = (one - truth).norm()
        assert (other - truth).norm() <= 2 * own + torch.finfo(other.dtype).eps * truth.norm()
        assert own < 0.02 * truth.norm()  # else the budget would allow anything
    assert set(plain.smoothing.values()) == {KERNEL}
    places = {site.rpartition(".")[2]: place for site, place in folded.smoothing.items()}
    for site, place in EXPECTED.get(name, {}).items():
        assert places[site] == f"{FOLDED} {place}"
    if name in NOT_FOLDED:
        assert places[NOT_FOLDED[name]].startswith(f"{KERNEL}: ")


def test_a_sparse_projection_keeps_its_vector_in_the_kernel():
    model, inputs = ZOO["llama"].build()
    plan = smoothed(model, inputs, projections="*.down_proj")
    _, folded = both(model, inputs, plan)
    places = folded.smoothing
    assert places["model.layers.0.mlp.down_proj"] == f"{KERNEL}: its input comes from nm_select"
    assert places["model.layers.0.self_attn.q_proj"] == f"{FOLDED} input_layernorm"


def _floats(outputs: object) -> list[Tensor]:
    """Return the tensors of floating point among the outputs of a graph."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [one for one in leaves if isinstance(one, Tensor) and one.is_floating_point()]
