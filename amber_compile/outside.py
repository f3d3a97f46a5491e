"""The linears of a model that no graph holds, each with the reason.

    its weight is read by a graph            in no multiplication that is recognised
    tracing stopped                          before anything read it
    the model has graph breaks               it runs at one, in Python, or is not called
    otherwise                                it is not called with these inputs

A module that has several names is one linear; the base layer of LoRA is its projection.
"""

from __future__ import annotations

from torch import nn

from .decision import dense
from .naming import module_site
from .report import Report, Site
from .rule import role_of

NOT_CALLED = "it is not called with these inputs"


def linears_outside(
    model: nn.Module, report: Report, read: set[int], stopped: str | None
) -> list[Site]:
    """Return a row for each ``nn.Linear`` of ``model`` that is no projection in ``report``.

    Args:
        model: as it was traced.
        report: of its graphs.
        read: identities of the tensors that its graphs read.
        stopped: why tracing ended half-way, if it did.
    """
    listed = {site.name for site in report.sites}
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(module_site(name))
    return [
        outside_site(known_as[0], linear, _why(linear, report, read, stopped))
        for linear, known_as in names.items()
        if listed.isdisjoint(known_as)
    ]


def _why(linear: nn.Linear, report: Report, read: set[int], stopped: str | None) -> str:
    """Return why no graph holds ``linear`` as a projection."""
    if id(linear.weight) in read:
        return "a graph reads its weight, and in no multiplication that is recognised"
    if stopped:
        return "no graph reads its weight before tracing stopped"
    if report.breaks:
        return "no graph reads its weight: it runs at a graph break, or is not called"
    return NOT_CALLED


def outside_site(name: str, linear: nn.Linear, reason: str) -> Site:
    """Return the row of a linear that stays dense because no graph shows it."""
    shape = linear.out_features, linear.in_features
    macs = 0 if reason == NOT_CALLED else shape[0] * shape[1]  # what may run counts
    size = linear.weight.nbytes
    return Site(name, shape, macs, "nn.Linear", dense(reason), role_of(name), weight_bytes=size)
