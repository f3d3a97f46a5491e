"""Cases that cover more and more."""

import torch
from torch import Tensor, nn

from amber_compile import explain
from amber_compile.evaluation.levels import coverage_cases


def test_each_level_covers_more(llama: nn.Module, batches: list[Tensor]) -> None:
    cases = coverage_cases(explain(llama, batches[0]), ["2:4"])
    assert list(cases) == [(preset, "2:4", at) for preset in ("amber", "paper") for at in range(3)]
    found = []
    for at in range(3):
        options = cases["paper", "2:4", at]
        assert (options["preset"], options["pattern"]) == ("paper", "2:4")
        report = explain(llama, batches[0], **options)
        found.append({site.role for site in report.sites if site.decision.sparse})
    rule = {"q", "gate", "down"}
    assert found == [rule, rule | {"o"}, rule | {"o", "up"}]


def test_a_role_that_no_projection_has_is_no_level() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.up_proj(x))

    cases = coverage_cases(explain(Root(), torch.ones(1, 4, 32)), ["2:4"])
    assert [case[2] for case in cases] == [0, 1, 0, 1]
    assert cases["amber", "2:4", 1]["projections"] == ["down_proj", "up_proj"]
