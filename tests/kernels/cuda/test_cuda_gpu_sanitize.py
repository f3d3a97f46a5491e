"""How what ``compute-sanitizer`` prints is read; it needs a GPU to run."""

from __future__ import annotations

import pytest
import sanitize

LAUNCHED = "launched mma_sp bf16 (1, 8, 64)\n"
CLEAN = LAUNCHED + "========= ERROR SUMMARY: 0 errors\n"
RACES = LAUNCHED + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("status", "log", "expected"),
    [
        (0, CLEAN, (True, "ERROR SUMMARY: 0 errors, 1 launches")),
        (99, RACES, (False, "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)")),
        (1, "Error: Device not supported\n", (False, "no summary, 0 launches, exit status 1")),
        (0, "========= ERROR SUMMARY: 0 errors\n", (False, "0 errors, 0 launches")),
    ],
)
def test_verdicts(status, log, expected):
    good, said = sanitize.verdict(status, log)
    assert good == expected[0]
    assert expected[1] in said


def test_each_tool_runs_the_launches_of_this_file():
    found = sanitize.command("racecheck", ["bf16"])
    assert found[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert found[-4:] == [sanitize.__file__, "--launch", "--kinds", "bf16"]
