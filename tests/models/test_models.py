"""Every model of the zoo: what is reported of its linears, and that it computes what it should.

Dynamo traces a model once. Each case of options rewrites that trace as ``amber_eager`` does, and
the compiled model runs the case that is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import emulate
import pytest
import torch
from emulate import Settings, sparsified
from expected import EXPECTED, FLAT, GATE, HEAD, NEVER, ROUTER, SPARSE
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.pytorch_utils import Conv1D
from zoo import ZOO

from amber_compile import Report, last_reports, register_model
from amber_compile.backend import amber_eager
from amber_compile.report import Site, clear_reports

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"  # transformers' MoE
)


@dataclass(frozen=True)
class Case:
    """Options of the backend, and what they mean in the emulation's words."""

    options: Mapping[str, Any]
    settings: Settings
    everything: bool = False

    def sites(self, model: str) -> dict[str, Settings]:
        """Return the settings of the projections of ``model`` that are to be sparse."""
        return {
            name: self._at(name, outcome)
            for name, outcome in EXPECTED[model].items()
            if self._is_sparse(model, name, outcome)
        }

    def _is_sparse(self, model: str, name: str, outcome: str) -> bool:
        if self.settings.dense_prefix and any(fnmatchcase(name, flat) for flat in FLAT):
            return False
        if self.everything:
            return outcome not in (HEAD, ROUTER) and not fnmatchcase(name, NEVER.get(model, ""))
        return outcome in (SPARSE, GATE)

    def _at(self, name: str, outcome: str) -> Settings:
        settings = self.settings
        if outcome == GATE and not self.everything:
            settings = replace(settings, part="gate")
        if "experts" in name.split(".") and settings.score == "robust_norm":
            settings = replace(settings, score="weight_norm")  # the paper: tokens are routed
        return settings


def rule(n: int, m: int, **settings: Any) -> Case:
    """Return our own rule: column norms and norm correction."""
    options = {"pattern": f"{n}:{m}", **settings}
    return Case(options, Settings(n, m, **{"correction": "norm", **settings}))


def paper(n: int, m: int) -> Case:
    """Return the paper's: Robust-Norm and no correction."""
    return Case({"preset": "paper", "pattern": f"{n}:{m}"}, Settings(n, m, "robust_norm"))


def everything(case: Case) -> Case:
    """Return ``case`` for every projection but heads and routers, fused ones as a whole."""
    skip = ["*.lm_head", "cls.*", "*.mlp.gate", "*.router", "*.shared_expert_gate"]
    return Case({**case.options, "projections": "*", "skip": skip}, case.settings, everything=True)


CASES = {
    "amber 2:4": rule(2, 4),
    "amber 4:8": rule(4, 8),
    "amber 8:16": rule(8, 16),
    "paper 2:4": paper(2, 4),
    "paper 4:8": paper(4, 8),
    "paper 8:16": paper(8, 16),
    "everything, amber": everything(rule(2, 4)),
    "everything, paper": everything(paper(8, 16)),
    "first tokens dense": rule(2, 4, dense_prefix=5),
    "variance, magnitude": rule(2, 4, correction="variance", score="magnitude"),
}
RULE = "amber 2:4"
KERNELS = ("reference", "")
"""Values of ``AMBER_CPU_KERNEL``: the operator's definition, and what runs by default."""


@dataclass
class Trial:
    """One model of the zoo, what was reported of it and its logits, for every case and kernel."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    reports: dict[str, list[Report]] = field(default_factory=dict)
    logits: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    case: str = RULE

    def backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite a graph once for each case, and run it as ``self.case`` says."""
        compiled = {}
        for name, case in CASES.items():
            clear_reports()
            compiled[name] = amber_eager(gm, inputs, options=case.options)
            self.reports.setdefault(name, []).extend(last_reports())
        return lambda *arguments: compiled[self.case](*arguments)

    def report(self, case: str) -> Report:
        """Return what was reported under ``case``, over all graphs."""
        return Report.merge(self.reports[case])

    @torch.no_grad()
    def emulated(self, case: str) -> Tensor:
        """Return the logits that the emulation has for ``case``."""
        with sparsified(self.model, CASES[case].sites(self.name)):
            logits: Tensor = self.model(**self.inputs).logits
        return logits


@pytest.fixture(scope="module", params=ZOO)
def trial(request: pytest.FixtureRequest) -> Trial:
    """Run one model under all cases."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    model, inputs = ZOO[request.param].build()
    register_model(model)  # models that break into several graphs lose their names otherwise
    trial = Trial(request.param, model, inputs)
    compiled = torch.compile(model, backend=trial.backend)
    with pytest.MonkeyPatch.context() as environment, torch.no_grad():
        for trial.case, kernel in itertools.product(CASES, KERNELS):
            environment.setenv("AMBER_CPU_KERNEL", kernel)
            trial.logits[trial.case, kernel] = compiled(**inputs).logits
    return trial


# ---- the report ----------------------------------------------------------------------------------


def linears(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape ``([experts,] outputs, channels)`` of every linear of ``model``.

    That is every matrix, or stack of them, that a module other than an embedding holds.
    """
    found = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or name.endswith("bias") or isinstance(module, nn.Embedding):
                continue
            shape = tuple(weight.shape)
            if isinstance(module, Conv1D) or getattr(module, "is_transposed", False):
                shape = (*shape[:-2], shape[-1], shape[-2])
            found[path if name == "weight" else f"{path}.{name}"] = shape
    return found


def test_every_linear_is_reported_once_with_its_shape(trial: Trial) -> None:
    reported = [site for graph in trial.report(RULE).graphs for site in graph.sites]
    expected = linears(trial.model)
    if trial.name == "mixtral_eager":
        # A Python loop over the experts that were hit: Dynamo leaves it out of every graph.
        expected = {name: shape for name, shape in expected.items() if ".experts." not in name}
    assert {site.name: site.shape for site in reported} == expected
    assert len({site.name for site in reported}) == len(reported)


def test_the_rule_decides_as_written_down(trial: Trial) -> None:
    sites = {site.name: site for site in trial.report(RULE).sites}
    assert sites.keys() == EXPECTED[trial.name].keys()
    wrong = {
        name: str(sites[name].decision)
        for name, outcome in EXPECTED[trial.name].items()
        if not _is(sites[name], outcome)
    }
    assert wrong == {}


def _is(site: Site, outcome: str) -> bool:
    settings = site.decision.settings
    if outcome in (SPARSE, GATE):
        return settings is not None and settings.part == ("gate" if outcome == GATE else None)
    return outcome in (site.decision.reason or "")


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_expected_projections_are_sparse(trial: Trial, case: str) -> None:
    report = trial.report(case)
    assert [graph.fallback for graph in report.graphs if graph.fallback] == []
    sparse = {site.name for site in report.sites if site.decision.sparse}
    assert sparse == CASES[case].sites(trial.name).keys()


def test_coverage_is_the_share_of_multiplications(trial: Trial) -> None:
    """Of those of the layers: heads and routers are not counted, experts once for each token's."""
    active = getattr(trial.model.config, "num_experts_per_tok", 1)
    total, covered = 0.0, 0.0
    for name, shape in linears(trial.model).items():
        outcome = EXPECTED[trial.name].get(name)
        if outcome not in (None, HEAD, ROUTER):
            macs = shape[-2] * shape[-1] * (active if len(shape) == 3 else 1)
            total += macs
            covered += macs * {SPARSE: 1, GATE: 0.5}.get(outcome, 0)
    assert math.isclose(trial.report(RULE).coverage, covered / total)


def test_sites_that_hide_their_sequence_say_so(trial: Trial) -> None:
    """The rule wants them sparse and ``dense_prefix`` prevents it: an obstacle, with a reason."""
    sites = {site.name: site for site in trial.report("first tokens dense").sites}
    hidden = CASES[RULE].sites(trial.name).keys() - CASES["first tokens dense"].sites(trial.name)
    for name in hidden:
        assert sites[name].decision.obstacle
        assert "sequence dimension" in sites[name].decision.reason


# ---- the output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_output_is_that_of_the_emulation_bit_for_bit(trial: Trial, case: str) -> None:
    expected = trial.emulated(case)
    assert torch.equal(trial.logits[case, "reference"], expected)
    if CASES[case].settings.correction is None:
        assert torch.equal(trial.logits[case, ""], expected)


@pytest.mark.parametrize("case", ["amber 2:4", "variance, magnitude"])
def test_kernel_rounds_corrections_no_worse_than_fp32(
    trial: Trial, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against corrections in fp64: within twice the error that fp32 makes of most tokens.

    Of most, because rounding turns a selection round where two scores nearly tie, and that token
    and those after it then differ by more; the kernel may do that to one token in sixteen.
    """
    rounded = trial.emulated(case)
    monkeypatch.setattr(emulate, "mean_square", _mean_square_in_float64)
    exact = trial.emulated(case)
    budget = 2 * _token_errors(rounded, exact).quantile(0.9)
    errors = _token_errors(trial.logits[case, ""], exact)
    assert (errors > budget).sum() <= errors.numel() // 16


def _mean_square_in_float64(x: Tensor) -> Tensor:
    return x.double().square().mean(-1, keepdim=True)


def _token_errors(logits: Tensor, exact: Tensor) -> Tensor:
    """Return ‖difference‖ / ‖exact‖ of every token."""
    difference = (logits.double() - exact.double()).norm(dim=-1)
    return (difference / exact.double().norm(dim=-1)).flatten()


def test_sparsity_changes_the_output(trial: Trial) -> None:
    """What is compared above is no dense output on both sides."""
    with torch.no_grad():
        dense = trial.model(**trial.inputs).logits
    assert all(not torch.equal(trial.logits[case, ""], dense) for case in CASES)
