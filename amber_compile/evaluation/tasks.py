"""Tasks of lm-evaluation-harness, dense and sparse side by side.

    evaluate_tasks(model, tokenizer, ["arc_easy"], pattern="2:4")
    evaluate_tasks(model, tokenizer, ["mine"], folder="tasks")        mine.yaml lies there

Both models answer the same requests, so the difference has an error of its own: the paired one,
from the answers to each document, wherever a metric is their mean. The harness' own errors stand
beside the two values. Tasks of a folder are found without reading the harness' list of thousands.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import nn

from amber_compile.debug.output_error import number
from amber_compile.errors import OptionError, choices, whole_number
from amber_compile.plan import Plan

from .side_by_side import config_of, plain, sides

LONGEST = 2048
"""Tokens of a model that does not say how many it reads."""
SEED = 1234
"""Of the examples in a prompt: the harness' own."""
BOOTSTRAP = 1000
"""Resamplings for the errors of metrics that are no means."""


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task: its name, or that of a group of tasks.
        metric: its name, and the filter of the answers if there is one.
        documents: that were asked about; 0 of a group.
        dense: the metric of the dense model; ``dense_se`` its standard error.
        sparse: of the sparse model, likewise.
        difference_se: the paired standard error of sparse - dense; None if not a mean.
    """

    task: str
    metric: str
    documents: int
    dense: float
    dense_se: float | None
    sparse: float
    sparse_se: float | None
    difference_se: float | None

    @property
    def difference(self) -> float:
        """Sparse minus dense."""
        return self.sparse - self.dense

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        values = {**vars(self), "difference": self.difference}
        return {
            name: value if isinstance(value, str | int) else number(value)
            for name, value in values.items()
        }

    def __str__(self) -> str:
        def shown(value: float, error: float | None) -> str:
            return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

        change = shown(self.difference, self.difference_se)
        sides = shown(self.dense, self.dense_se), shown(self.sparse, self.sparse_se)
        return f"{self.task} {self.metric}: dense {sides[0]}, sparse {sides[1]}, change {change}"


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | PathLike[str] | None = None,
    limit: int | None = None,
    batch: int = 8,
    plan: Plan | str | None = None,
    backend: str = "amber_eager",
    progress: bool = True,
    **options: Any,
) -> list[TaskResult]:
    """Return what sparsity changes in the answers of ``model``, a result for each metric.

    Args:
        model: a causal language model, with its weights.
        tokenizer: of transformers.
        tasks: names of tasks or groups of lm-evaluation-harness.
        folder: where further tasks lie, as the harness' YAML files.
        limit: documents of each task; all by default.
        batch: requests at a time.
        plan: a plan, or the path of one.
        backend: ``"amber_eager"``, or ``"amber"`` to run what Inductor generates.
        progress: show bars on stderr.
        options: the fields of :class:`AmberConfig`.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
        OptionError: for an unknown task, option or value.
    """
    if limit is not None:
        whole_number("limit", limit, 1)
    config = config_of(options if plan is None else {**options, "plan": plan})
    model = plain(model)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", LONGEST)
    device = next((one.device for one in model.parameters()), None)
    settings = {"longest": longest, "batch": batch, "device": device, "progress": progress}
    with _quiet(progress):
        harness_model, loaded = _harness_model(), _load(tasks, folder)
        with sides(model, {"sparse": config}, backend=backend, dynamic=True) as (dense, sparse):
            found = [
                _run(harness_model(score, dense, tokenizer, **settings), loaded, limit)
                for score in (dense, sparse["sparse"])
            ]
    return list(_paired(*found))


def _run(lm: Any, loaded: Any, limit: int | None) -> dict[str, Any]:
    """Have the harness ask ``lm``, and return what it found."""
    from lm_eval.evaluator import evaluate

    found: dict[str, Any] = evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP)
    return found


def _load(tasks: Sequence[str], folder: str | PathLike[str] | None) -> Any:
    """Return the tasks, from ``folder`` if all lie there.

    Raises:
        OptionError: for a task that is not known.
    """
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise OptionError("tasks= names no task")
    manager: Any = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=folder)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise OptionError(choices("task", task, manager.all_tasks))
    loaded = manager.load(list(tasks))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def _harness_model() -> Any:
    """Import what needs the harness.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        from .harness import HarnessModel
    except ImportError as cause:
        raise ImportError(
            f"tasks need lm-evaluation-harness: pip install 'amber-compile[eval]' ({cause})"
        ) from cause
    return HarnessModel


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep the harness' advice, its dependencies' deprecations, and perhaps its bars to itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if not progress:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logger.setLevel(level)


# ---- results -------------------------------------------------------------------------------------


def _paired(dense: Mapping[str, Any], sparse: Mapping[str, Any]) -> Iterator[TaskResult]:
    """Yield each metric of what the harness found for both models."""
    for task, values in dense["results"].items():
        asked, again = (_answers(side.get("samples", {}).get(task, [])) for side in (dense, sparse))
        others = sparse["results"][task]
        for name, value in values.items():
            metric, _, how = name.partition(",")
            if not isinstance(value, int | float) or not how or metric.endswith("_stderr"):
                continue
            error = f"{metric}_stderr,{how}"
            yield TaskResult(
                task,
                metric if how == "none" else f"{metric} ({how})",
                len({document for document, _ in asked}),
                float(value),
                _number(values.get(error)),
                float(others[name]),
                _number(others.get(error)),
                _error_of_difference(asked, again, metric, how, float(others[name]) - value),
            )


def _answers(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, Any], Mapping[str, Any]]:
    return {(one["doc_id"], one["filter"]): one for one in samples}


def _error_of_difference(
    dense: Mapping[Any, Mapping[str, Any]],
    sparse: Mapping[Any, Mapping[str, Any]],
    metric: str,
    how: str,
    difference: float,
) -> float | None:
    """Return the error of the mean difference of answers, if that mean is ``difference``."""
    pairs = [(one.get(metric), sparse[at].get(metric)) for at, one in dense.items() if at[1] == how]
    if len(pairs) < 2 or not all(isinstance(x, int | float) for pair in pairs for x in pair):
        return None
    each = [float(b) - float(a) for a, b in pairs]  # type: ignore[arg-type]  # numbers, all of them
    if not math.isclose(statistics.fmean(each), difference, abs_tol=1e-9):
        return None
    return statistics.stdev(each) / math.sqrt(len(each))


def _number(value: Any) -> float | None:
    """Return the harness' number; it writes N/A where it has none."""
    return float(value) if isinstance(value, int | float) else None
