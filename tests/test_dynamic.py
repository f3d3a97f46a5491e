"""``dynamic=True``: one graph for all lengths, and floats that Dynamo takes for variables.

Inductor finds out that a float cannot stay variable only while it compiles. It then asks Dynamo to
enter the backend again, by an exception that is no failure.
"""

import pytest
import torch
from torch import Tensor, nn

from amber_compile import last_reports


class Attention(nn.Module):
    """A projection, then an operator whose float argument cannot be a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.scaling = 0.125

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        return nn.functional.scaled_dot_product_attention(q, q, q, scale=self.scaling)


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_a_float_that_has_to_be_fixed_leaves_the_graph_sparse() -> None:
    model = Attention().eval()
    compiled = torch.compile(model, backend="amber", dynamic=True, options={"pattern": "4:4"})
    x = torch.randn(2, 8, 32)
    torch.testing.assert_close(compiled(x), model(x))
    (graph,) = last_reports()[-1].graphs
    assert graph.fallback is None
    assert graph.rewritten == 1


@torch.no_grad()
def test_all_lengths_share_a_graph() -> None:
    compiled = torch.compile(Attention().eval(), backend="amber_eager", dynamic=True)
    for batch, length in ((2, 8), (3, 24), (5, 7)):
        compiled(torch.randn(batch, length, 32))
    assert len(last_reports()) == 1
