"""``amber plan show PLAN`` and ``amber plan diff A B``: look into plan files.

    amber plan show llama.plan
    amber plan diff yesterday.plan today.plan --json > changes.json

``diff`` ends as diff(1) does: 0 if the plans do the same, 1 if not, 2 if one cannot be read. Who
made a plan and when is shown, but makes no difference.
"""

from __future__ import annotations

import argparse
import json

from amber_compile.plan import Plan, PlannedSite
from amber_compile.plan_diff import columns
from amber_compile.plan_totals import PlanTotals
from amber_compile.quantization import Quantization
from amber_compile.settings import Settings

HELP = "look into plan files: show one, or tell how two differ"
HEADINGS = ("projection", "weight", "input", "how, or why not", "quantised", "tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="every projection of a plan, and its totals")
    show.add_argument("plan", metavar="PLAN", help="plan file")
    diff = actions.add_parser("diff", help="what differs; status 0 if nothing does, else 1")
    diff.add_argument("before", metavar="A", help="plan file")
    diff.add_argument("after", metavar="B", help="plan file")
    for action in (show, diff):
        action.add_argument("--json", action="store_true", help="for machines")


def run(arguments: argparse.Namespace) -> int:
    """Show or compare."""
    if arguments.action == "show":
        plan = Plan.load(arguments.plan)
        print(json.dumps(_facts(plan), indent=2) if arguments.json else _table(plan))
        return 0
    changes = Plan.load(arguments.before).diff(Plan.load(arguments.after))
    print(json.dumps(changes.to_json(), indent=2) if arguments.json else changes)
    return 0 if changes.equal else 1


def _facts(plan: Plan) -> dict[str, object]:
    body = plan.to_json()
    names = {site: plan.tensors.names(site) for site in plan.tensors.sites}
    totals = PlanTotals.of(plan).to_json()
    return {"made": body["made"], "totals": totals, "sites": body["sites"], "tensors": names}


def _table(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = [HEADINGS]
    rows += [_row(name, site, plan.tensors.names(name)) for name, site in plan.sites.items()]
    made = [f"{what}: {value}" for what, value in plan.made.items()]
    return "\n".join(
        [*columns(rows), "", *columns(PlanTotals.of(plan).lines()), "", *made]
    ).rstrip()


def _row(name: str, site: PlannedSite, tensors: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(site.choice, Settings):
        chosen = str(site.choice.pattern), site.choice.how
    else:
        chosen = "dense", site.choice
    quantized = site.quantization
    words = str(quantized) if isinstance(quantized, Quantization) else f"16 bit: {quantized}"
    shape = "x".join(map(str, site.shape))
    return name, shape, *chosen, "" if quantized is None else words, ", ".join(tensors)
