"""A calibration covers what was asked for, keeps its bound and says why; bad input is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import SITES, VOCABULARY, Toy, text

import amber_compile
from amber_compile.calibration import (
    Calibration,
    CalibrationError,
    CalibrationOptions,
    calibrate,
    calibration,
)
from amber_compile.calibration.answers import Answer
from amber_compile.errors import OptionError
from amber_compile.plan import Plan
from amber_compile.quantization import Quantization
from amber_compile.settings import Settings


def made(model: nn.Module | None = None, **options) -> Calibration:
    chosen = CalibrationOptions(**{"steps": 3, **options})
    return calibration(model or Toy(), text(), chosen, progress=False)


def sparse(plan: Plan) -> dict[str, Settings]:
    return {n: s.choice for n, s in plan.sites.items() if isinstance(s.choice, Settings)}


@pytest.fixture(scope="module")
def bounded() -> Calibration:
    torch.set_num_threads(1)
    return made(max_error=0.15)


def test_the_damage_stays_below_the_bound(bounded: Calibration) -> None:
    assert 0 < bounded.settled.measured.mean <= 0.15
    assert 0 < len(bounded.settled.chosen) < len(SITES)
    assert sparse(bounded.plan).keys() == bounded.settled.chosen.keys()


def test_the_plan_accounts_for_every_linear(bounded: Calibration) -> None:
    assert list(bounded.plan.sites) == [*SITES, "lm_head"]
    reasons = {n: s.choice for n, s in bounded.plan.sites.items() if isinstance(s.choice, str)}
    assert reasons.pop("lm_head") == "a head is not calibrated"
    assert set(reasons.values()) == {"calibration: its damage is not worth its share"}


def test_the_plan_says_who_what_and_when(bounded: Calibration) -> None:
    told = bounded.plan.made
    assert told["by"] == "amber calibrate"
    assert told["torch"] == torch.__version__
    assert told["tokens"] == "144 fitted, 48 held out"
    assert json.loads(told["options"])["max_error"] == 0.15
    assert told["when"].startswith("20")
    assert told["second weights"] == "0 bytes"


def test_the_compiled_model_has_the_measured_damage(bounded: Calibration, tmp_path: Path) -> None:
    """What calibration saw is what the backend runs, from a saved plan."""
    bounded.plan.save(tmp_path / "toy.plan")
    model = Toy()
    options = {"plan": str(tmp_path / "toy.plan"), "strict": True}
    compiled = torch.compile(model, backend="amber_eager", options=options)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    heldout = [text()[at] for at in order[:2]]
    with torch.no_grad():
        found = [Answer(model(one), one).distances(Answer(compiled(one), one)) for one in heldout]
    assert torch.cat(found).mean().item() == pytest.approx(bounded.settled.measured.mean, rel=1e-9)
    assert amber_compile.last_reports()[-1].coverage == pytest.approx(bounded.coverage)


def test_a_tighter_bound_covers_no_more(bounded: Calibration) -> None:
    tight = made(max_error=0.05)
    assert tight.settled.measured.mean <= 0.05
    assert tight.settled.macs < bounded.settled.macs
    assert made(max_error=0.0).plan.made["coverage"] == "0.0000"


def test_a_coverage_is_reached() -> None:
    found = made(coverage=0.5)
    assert 0.5 <= found.coverage < 0.6
    with pytest.raises(CalibrationError, match=r"coverage=0\.9 cannot be reached: .* hold 0\.7143"):
        made(coverage=0.9, skip=["*.up_proj"])


def test_the_default_bound_is_what_the_paper_costs() -> None:
    found = made()
    assert found.settled.wanted == found.paper
    assert found.settled.measured.mean <= found.paper
    assert found.coverage > 5 / 7  # of the paper's rule: q, gate and down


def test_the_paper_s_rule_takes_the_paper_s_projections() -> None:
    found = made(rule="paper", corrections="none")
    assert set(sparse(found.plan)) == {name for name in SITES if "up_proj" not in name}
    assert {str(one) for one in sparse(found.plan).values()} == {"2:4, weight_norm"}
    assert len(found.plan.tensors) == 0


def test_corrections_are_what_was_allowed_and_help() -> None:
    none, free, both = (
        made(rule="paper", corrections=one, steps=8) for one in ("none", "free", "all")
    )
    damages = [one.settled.measured.mean for one in (none, free, both)]
    assert damages[2] < damages[1] < damages[0]
    assert not any(one.updated_weight for one in sparse(free.plan).values())
    assert any(one.output_scale for one in sparse(free.plan).values())
    weights = [name for name in SITES if "weight" in both.plan.tensors.names(name)]
    assert weights
    size = sum(both.plan.tensors.get(name, "weight").nbytes for name in weights)
    assert both.plan.made["second weights"] == f"{size} bytes"


def test_norm_correction_is_tried_when_it_is_named() -> None:
    found = made(rule="paper", corrections=("norm",))
    ways = {how.sparse.settings.correction for own in found.choices.values() for how in own}
    assert ways <= {None, "norm"}
    assert "norm" in ways


def test_projections_and_skip_bound_the_choice() -> None:
    found = made(coverage=0.1, projections=["*.down_proj"], skip=["layers.0.*"])
    assert set(sparse(found.plan)) == {"layers.1.down_proj"}
    assert found.plan.sites["layers.0.down_proj"].choice == "skip='layers.0.*'"


def test_a_quantised_plan_has_one_smooth_vector_for_each_input() -> None:
    found = made(coverage=0.3, quantize="int8", smooth="smoothquant", alpha=0.5)
    plan = found.plan
    assert plan.sites["layers.0.up_proj"].quantization == Quantization("int8", "smoothquant", 0.5)
    assert isinstance(plan.sites["lm_head"].quantization, str)
    gate, up, down = (
        plan.tensors.get(f"layers.0.{n}_proj", "smooth") for n in ("gate", "up", "down")
    )
    assert torch.equal(gate, up)
    assert down.shape == (32,)
    assert (
        made(coverage=0.3, quantize="int8", smooth=None).plan.tensors.get(SITES[0], "smooth")
        is None
    )


def test_a_model_without_logits_is_calibrated_by_its_output() -> None:
    found = made(Toy(logits=False), max_error=0.05)
    assert 0 < found.settled.measured.mean <= 0.05


def test_the_model_is_bit_identical_afterwards() -> None:
    model = Toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made(model, coverage=0.5, corrections="all")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "phi3"])
def test_other_spellings_are_calibrated(name: str) -> None:
    """Experts have a factor each, Conv1D stores K first, phi3 fuses gate and up."""
    pytest.importorskip("transformers")
    from zoo import ZOO

    model, inputs = ZOO[name].build()
    torch.manual_seed(1)
    batches = [torch.randint(3, 96, inputs["input_ids"].shape) for _ in range(4)]
    options = CalibrationOptions(coverage=0.4, steps=2)
    found = calibration(model, batches, options, progress=False)
    assert found.coverage >= 0.4
    compiled = torch.compile(
        model, backend="amber_eager", options={"plan": found.plan, "strict": True}
    )
    with torch.no_grad():
        compiled(batches[0])
    assert amber_compile.last_reports()[-1].coverage == pytest.approx(found.coverage)


# ---- bad input -----------------------------------------------------------------------------------


def test_too_little_text_is_refused() -> None:
    for count in (0, 1):
        with pytest.raises(CalibrationError, match=f"{count} batches of text are too few"):
            calibrate(Toy(), text(count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patern": "2:4"}, "unknown option 'patern'; did you mean 'pattern'"),
        ({"pattern": "3:5"}, "is not an N:M pattern"),
        ({"max_error": 0.1, "coverage": 0.5}, "max_error= and coverage= both say how much"),
        ({"coverage": 1.5}, r"coverage=1\.5 must be a number from 0 to 1"),
        ({"max_error": -1}, r"max_error=-1 must be a number from 0 to inf"),
        ({"corrections": "some"}, "unknown corrections 'some'"),
        ({"corrections": ["nrom"]}, "unknown corrections 'nrom'; did you mean 'norm'"),
        ({"rule": "mine"}, "unknown rule 'mine'"),
        ({"quantize": "int4"}, "unknown quantize 'int4'"),
        ({"validation": 0.0}, r"validation=0\.0 must be"),
        ({"skip": 3}, "skip=3 must be fnmatch patterns"),
        ({"steps": -1}, "steps=-1 must be a whole number"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(Toy(), text(), **options)


def test_a_model_that_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(TypeError, match="calibrate takes a torch"):
        calibrate(lambda x: x, text())
    with pytest.raises(CalibrationError, match=r"training mode; call model\.eval\(\)"):
        calibrate(Toy().train(), text())
    with torch.device("meta"):
        weightless = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)).eval()
    with pytest.raises(CalibrationError, match="shapes and no values"):
        calibrate(weightless, text())
    odd = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)).eval()
    with pytest.raises(
        CalibrationError, match=r"no projection can be sparse: .*K = 6 is not a mult"
    ):
        calibrate(odd, text())


def test_a_bound_without_a_paper_must_be_said() -> None:
    unnamed = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)).eval()
    with pytest.raises(CalibrationError, match="say max_error= or coverage="):
        calibrate(unnamed, text(), progress=False)
    assert (
        calibrate(unnamed, text(), coverage=1.0, steps=1, progress=False).made["coverage"]
        == "1.0000"
    )


def test_a_permuted_plan_is_for_the_permuted_model() -> None:
    """As measured, once ``permute_channels`` was called; the model itself stays as it is."""
    from amber_compile.permute import permute_channels

    model = Toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = made(model, rule="paper", corrections="factor,permutation")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    permuted = {name for name, one in sparse(found.plan).items() if one.permuted}
    assert permuted
    assert permuted <= {"layers.0.down_proj", "layers.1.down_proj"}
    assert all(found.plan.sites[name].moves for name in permuted)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    heldout = [text()[at] for at in order[:2]]
    dense = Toy()
    permute_channels(model, found.plan)
    compiled = torch.compile(
        model, backend="amber_eager", options={"plan": found.plan, "strict": True}
    )
    with torch.no_grad():
        damage = [Answer(dense(one), one).distances(Answer(compiled(one), one)) for one in heldout]
    # the same sums of float32 in another order
    assert torch.cat(damage).mean().item() == pytest.approx(found.settled.measured.mean, rel=1e-3)
