"""The README: two commands come first, CI runs the second, and no link leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [file for folder in (".", "docs", "benchmarks") for file in ROOT.glob(f"{folder}/*.md")]
INSTALL = "pip install torch==2.13.0 && pip install -e "


def test_two_commands_come_first() -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (first, example), (second, checks) = blocks[:2]
    assert first == second == "sh"
    assert INSTALL + "'.[examples]' && python examples/quickstart.py\n" in example
    assert INSTALL + "'.[dev]' && .ci/check\n" in checks
    assert example.count("\n") == checks.count("\n") == 1


def test_ci_runs_the_second_command() -> None:
    steps = [*INSTALL.replace("-e ", "-e '.[dev]'").split(" && "), ".ci/check"]
    assert "\n".join(steps) in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
