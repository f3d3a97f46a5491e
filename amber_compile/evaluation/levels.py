"""Cases that cover more and more of a model, for an error-coverage frontier.

    the rule      q, gate and down, in most layers          what the paper covers
    and o         with every o_proj
    and up        with every up_proj as well                all but k, v and the head

each by every preset and some patterns, uncalibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amber_compile.config import PRESETS
from amber_compile.report import Report

PATTERNS = ("2:4", "8:16")
MORE = ("o", "up")
"""Roles that are added, one after the other."""

Case = tuple[str, str, int]
"""Preset, pattern and level."""


def coverage_cases(
    report: Report, patterns: Sequence[str] = PATTERNS
) -> dict[Case, dict[str, Any]]:
    """Return the cases of a model, from the report of a model that is sparse by the rule."""
    covered = [site.name for site in report.sites if site.decision.sparse]
    levels: list[dict[str, Any]] = [{}]
    for role in MORE:
        more = [site.name for site in report.sites if site.role == role]
        covered = list(dict.fromkeys([*covered, *more]))
        levels += [{"projections": covered}] * bool(more)
    return {
        (preset, pattern, at): {"preset": preset, "pattern": pattern, **level}
        for preset in PRESETS
        for pattern in patterns
        for at, level in enumerate(levels)
    }
