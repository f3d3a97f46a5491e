"""Find which step, and which site, causes an output error above a bound.

    bisect(model, input_ids, bound=0.1)       ->  Bisection: .blamed, .sites, str()

    dense ─► method ─► kernels ─► fuse_projections ─► code generation      (partial_runs.py)

Each step is compared with the one before, so a wrong kernel or a miscompile is told apart from what
sparsity costs. In the first step above the bound the sites are searched: with the first k of them
sparse and the rest dense, k is bisected for where the error passes the bound. A site found so is to
blame if it passes the bound alone, or adds more than the bound; then the others are searched again.
Otherwise the sites of the largest error of their own are tried alone: errors may cancel, so that
the bound is passed elsewhere. If none of them passes it, the error grows gradually, and these
contributions are reported.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from amber_compile.errors import OptionError
from amber_compile.explain import config_for
from amber_compile.inductor import compile_with_inductor
from amber_compile.variants import Inner

from .bisection import Bisection, Culprit, Step
from .output_error import level, output_error
from .partial_runs import Names, PartialRuns, StepFailed
from .replay import Call

MOST = 5
"""How many sites to blame are searched for, and how many contributions are reported."""

Measure = Callable[[Any, Any], float]


def bisect(
    model: nn.Module,
    *args: Any,
    bound: float,
    kwargs: Mapping[str, Any] | None = None,
    error: Measure | None = None,
    compiler: Inner | None = compile_with_inductor,
    **options: Any,
) -> Bisection:
    """Return which step and which sites cause an output error above ``bound``.

    A search takes about log2(sites) runs of the model; if generated code is to blame, as many
    compilations.

    Args:
        model: with its weights.
        args: positional inputs of the model.
        bound: the largest error that is allowed; NaN and infinity are above every bound.
        kwargs: keyword inputs of the model.
        error: from two outputs, that of the dense model or the step before first, to a number; by
            default relative l2 (of the logits, where there are some).
        compiler: generates code for a graph; None leaves that step out.
        options: the fields of :class:`AmberConfig`.

    Raises:
        TypeError: if ``model`` is no module.
        OptionError: for an unknown option or value, or a model on the meta device.
    """
    if not isinstance(bound, int | float) or isinstance(bound, bool) or not 0 <= bound < math.inf:
        raise OptionError(f"bound={bound!r} must be a number >= 0, and finite")
    call = Call(model, args, kwargs, "bisect")
    config = replace(config_for(call.model, options), strict=False, check=False)
    with _progress() as advance:
        runs = PartialRuns(call, config, compiler, advance)
        with runs.open():
            return Search(runs, float(bound), error or _relative).result()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[], object]]:
    """Show a bar of runs on a terminal, if tqdm is installed; yield what advances it."""
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:  # it comes with the extra "examples": nothing needs it
        yield lambda: None
        return
    with tqdm(desc="bisect", unit=" runs", leave=False, disable=None) as bar:
        yield bar.update


def _relative(expected: Any, actual: Any) -> float:
    return output_error(expected, actual).relative


# ---- search --------------------------------------------------------------------------------------


class Search:
    """Blames a step, then the sites of it."""

    def __init__(self, runs: PartialRuns, bound: float, error: Measure) -> None:
        self._runs = runs
        self._bound = bound
        self._error = error
        self._known: dict[tuple[str, ...], float] = {}

    def result(self) -> Bisection:
        """Return what is to blame."""
        runs = self._runs
        runs.plan()
        steps, total = self._steps()
        above = [at for at, step in enumerate(steps) if level(step.error) > self._bound]
        found = Bisection(self._bound, total, steps)
        if not above and not level(total) > self._bound:
            return replace(found, runs=runs.count)
        names = ["dense", *(step.name for step in steps)]
        at = above[0] if above else len(steps) - 1
        self._pair = names[at if above else 0], names[at + 1]
        found = replace(found, blamed=steps[at].name if above else "all steps")
        if self._is_above([]):
            return replace(found, dense=self._value([]), runs=runs.count)
        sites, contributions = self._culprits(), []
        if not sites:
            contributions = self._contributions()
            sites = [one for one in contributions if level(one.alone) > self._bound]
        return replace(found, sites=sites, contributions=contributions, runs=runs.count)

    def _steps(self) -> tuple[list[Step], float]:
        """Measure every step against the one before, and the last against the dense model."""
        dense = before = self._runs.output("dense", [])
        steps: list[Step] = []
        for name in ("method", "kernels", "fuse_projections", "code generation"):
            if name not in self._runs.steps:
                continue
            try:
                after = self._runs.output(name, self._runs.planned)
            except StepFailed as failure:
                steps.append(Step(name, math.inf, str(failure)))
                return steps, math.inf
            steps.append(Step(name, self._error(before, after)))
            before = after
        return steps, self._error(dense, before)

    def _culprits(self) -> list[Culprit]:
        """Return the sites that pass the bound alone, or add more than it to those before."""
        found: list[Culprit] = []
        left = list(self._runs.planned)
        while len(found) < MOST and self._is_above(left):
            low, high = 0, len(left)  # the first ``low`` sites are within the bound
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self._is_above(left[:middle]) else (middle, high)
            site, added = left[low], self._value(left[:high]) - self._value(left[:low])
            alone = self._value([site])
            if not max(level(alone), level(added)) > self._bound:
                break
            with_it = self._value(left)
            left.remove(site)
            found.append(Culprit(site, alone, self._value(left), with_it))
        return found

    def _contributions(self) -> list[Culprit]:
        """Return what the sites of the largest own errors do to the output, each alone."""
        largest = [self._measured(name) for name in self._runs.ranked[:MOST]]
        return sorted(largest, key=lambda one: level(one.alone), reverse=True)

    def _measured(self, name: str) -> Culprit:
        """Return what a site does alone, and what leaving it out does if that is too much."""
        planned, alone = self._runs.planned, self._value([name])
        if level(alone) <= self._bound:
            return Culprit(name, alone)
        others = [one for one in planned if one != name]
        return Culprit(name, alone, self._value(others), self._value(planned))

    def _is_above(self, names: Names) -> bool:
        return level(self._value(names)) > self._bound

    def _value(self, names: Names) -> float:
        """Return the error of the blamed step with the sites ``names`` sparse."""
        key = tuple(names)
        if key not in self._known:
            before, after = self._pair
            try:
                outputs = [self._runs.output(step, names) for step in (before, after)]
                self._known[key] = self._error(*outputs)
            except StepFailed:
                self._known[key] = math.inf
        return self._known[key]
