"""What a search for the cause of an error found; ``str()`` of it is for people.

bound 0.1, error of the output 3.2
step              error     from the step before
method            3.2       above the bound
kernels           0
code generation   2e-07

model.layers.3.mlp.down_proj is to blame: 3.1 alone; 0.04 without it, 3.2 with it
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .output_error import level

GRADUAL = "no single site is to blame: the error grows gradually; the largest contributions:"


@dataclass(frozen=True)
class Step:
    """One step from the dense model to the compiled sparse one.

    Attributes:
        name: ``method``, ``kernels``, ``fuse_projections``, ``code generation`` or ``all steps``.
        error: of the output against the step before; infinite if the step failed.
        failure: the error that it failed with, if it did.
    """

    name: str
    error: float
    failure: str = ""


@dataclass(frozen=True)
class Culprit:
    """A site that lifts the output error over the bound, or contributes to it.

    Attributes:
        name: qualified name of the site.
        alone: error with this site sparse and all others dense.
        without: error with all sites sparse but this one (and culprits found before), if measured.
        with_it: the same error with this one too, if measured.
    """

    name: str
    alone: float
    without: float | None = None
    with_it: float | None = None

    def __str__(self) -> str:
        told = f"{self.name}: {self.alone:.4g} alone"
        if self.without is None or self.with_it is None:
            return told
        return f"{told}; {self.without:.4g} without it, {self.with_it:.4g} with it"


@dataclass(frozen=True)
class Bisection:
    """Which step, and which sites, cause an output error above ``bound``.

    Attributes:
        bound: the error that is still allowed.
        error: of the compiled sparse model's output against the dense one's.
        steps: from the dense model on, each with its own error.
        blamed: name of the first step above the bound, ``all steps`` if only together they are,
            or "" if none is: the error is within the bound.
        sites: the sites to blame, the first in execution order first; empty if none is alone.
        contributions: the largest errors of sites alone, where no single site is to blame.
        dense: the step is above the bound without a sparse site too: its error with all dense.
        runs: how often the model ran.
    """

    bound: float
    error: float
    steps: list[Step]
    blamed: str = ""
    sites: list[Culprit] = field(default_factory=list)
    contributions: list[Culprit] = field(default_factory=list)
    dense: float | None = None
    runs: int = 0

    @property
    def verdict(self) -> str:
        """The answer, in words."""
        if not self.blamed:
            return f"nothing to find: no step's error is above {self.bound:g}"
        if self.dense is not None:
            return f"no site is to blame: with every site dense the error is {self.dense:.4g} too"
        if self.sites:
            many = "is" if len(self.sites) == 1 else "are"
            names = ", ".join(site.name for site in self.sites)
            return f"{self.blamed}: {names} {many} to blame"
        return f"{self.blamed}: {GRADUAL}"

    def __str__(self) -> str:
        wide = max(len(step.name) for step in self.steps)
        lines = [f"bound {self.bound:g}, error of the output {self.error:.4g}"]
        for step in self.steps:
            mark = "above the bound" if level(step.error) > self.bound else ""
            note = "  ".join(filter(None, [mark, " ".join(step.failure.split())]))
            lines.append(f"  {step.name:{wide}}  {step.error:10.4g}  {note}".rstrip())
        lines.append(self.verdict)
        lines += [f"  {site}" for site in self.sites or self.contributions]
        return "\n".join(lines)
