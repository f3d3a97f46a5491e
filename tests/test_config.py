"""The options: what each takes, what each refuses and how it says so."""

import pickle
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from amber_compile import AmberConfig, Pattern, Plan, Settings
from amber_compile.config import MODES, PRESETS
from amber_compile.errors import OptionError, PlanError
from amber_compile.plan import PlannedSite
from amber_compile.quantization import Quantization
from amber_compile.scores import SCORES

PLAN = Plan({"q_proj": PlannedSite((8, 16), Settings())})

GOOD: dict[str, list[tuple[object, object]]] = {
    "preset": [(name, name) for name in ("amber", "paper")],
    "pattern": [
        (None, None),
        ("2:4", Pattern(2, 4)),
        (" 8:16 ", Pattern(8, 16)),
        (Pattern(1, 2), Pattern(1, 2)),
    ],
    "score": [(score, score) for score in (*SCORES, "preset")],
    "correction": [(value, value) for value in (None, "norm", "variance", "preset")],
    "projections": [
        (None, None),
        ("*.q_proj", ("*.q_proj",)),
        (["*.q_proj", "*.down_proj"], ("*.q_proj", "*.down_proj")),
        (("*.q_proj",), ("*.q_proj",)),
        ((name for name in ("a", "b")), ("a", "b")),
        ([], ()),
    ],
    "skip": [("*.q_proj", ("*.q_proj",)), (["a", "b"], ("a", "b")), ((), ())],
    "quantize": [(value, value) for value in (None, "int8", "fp8")],
    "quantize_skip": [("*.o_proj", ("*.o_proj",)), ((), ())],
    "decode": [(None, None)],
    "fold_smooth": [(True, True), (False, False)],
    "plan": [(None, None), (PLAN, PLAN)],
    "min_tokens": [(1, 1), (512, 512), (np.int64(64), 64)],
    "dense_prefix": [(None, None), (0, 0), (4, 4), (np.int32(2), 2)],
    "strict": [(True, True), (False, False)],
    "check": [(True, True), (False, False)],
    "mode": [(mode, mode) for mode in MODES],
    "inductor": [({}, {}), ({"max_autotune": True}, {"max_autotune": True})],
}

BAD: dict[str, list[tuple[object, str]]] = {
    "preset": [
        ("ambre", "unknown preset 'ambre'; did you mean 'amber'? valid: amber, paper"),
        (None, "unknown preset None; valid: amber, paper"),
    ],
    "pattern": [
        ("2-4", "pattern='2-4' is malformed; write it as 'N:M', such as '2:4'"),
        ("3:2", "pattern=3:2 is not an N:M pattern; valid: 1 <= N <= M <= 32"),
        ((2, 4), "pattern=(2, 4) is malformed"),
        ("", "pattern='' is malformed"),
    ],
    "score": [
        ("magnitud", "unknown score 'magnitud'; did you mean 'magnitude'? valid: magnitude, pres"),
        (None, "unknown score None; valid: magnitude, preset, robust_norm, weight_norm"),
    ],
    "correction": [
        ("None", "unknown correction 'None'; did you mean 'None'? valid: None, norm, preset"),
        (0, "unknown correction 0; valid: None, norm, preset, variance"),
    ],
    "projections": [
        (3, "projections=3 must be a list of fnmatch patterns like '*.q_proj'"),
        ([None], "projections=[None] must hold fnmatch patterns like '*.q_proj' only"),
        ("", "projections='' must hold fnmatch patterns"),
        ([b"*.q_proj"], "must hold fnmatch patterns"),
    ],
    "skip": [(None, "skip=None must be a list of fnmatch patterns"), ([""], "skip=[''] must hold")],
    "quantize": [
        ("int4", "unknown quantize 'int4'; did you mean 'int8'? valid: None, fp8, int8"),
        (8, "unknown quantize 8; valid: None, fp8, int8"),
    ],
    "quantize_skip": [(None, "quantize_skip=None must be a list of fnmatch patterns")],
    "fold_smooth": [(1, "fold_smooth=1 must be True or False")],
    "decode": [
        ("int8", "decode='int8' shares the weights of prefill, which are quantised to None"),
        ("16bit", "unknown decode '16bit'; valid: None, fp8, int8"),
    ],
    "plan": [
        (3, "plan=3 must be a Plan or the path of a plan file"),
        ({}, "plan={} must be a Plan or the path of a plan file"),
    ],
    "min_tokens": [
        (0, "min_tokens=0 must be a whole number >= 1"),
        (-5, "min_tokens=-5 must be a whole number >= 1"),
        (1.0, "min_tokens=1.0 must be a whole number >= 1"),
        ("8", "min_tokens='8' must be a whole number >= 1"),
        (True, "min_tokens=True must be a whole number >= 1"),
        (None, "min_tokens=None must be a whole number >= 1"),
    ],
    "dense_prefix": [
        (-1, "dense_prefix=-1 must be a whole number >= 0"),
        ("1", "dense_prefix='1' must be a whole number >= 0"),
    ],
    "strict": [(1, "strict=1 must be True or False"), ("yes", "strict='yes' must be True or")],
    "check": [(None, "check=None must be True or False")],
    "mode": [
        ("max_autotune", "unknown mode 'max_autotune'; did you mean 'max-autotune'? valid: "),
        (None, "unknown mode None; valid: default, lite, max-autotune"),
    ],
    "inductor": [
        (None, "inductor=None must be a dict of config patches"),
        ([("max_autotune", True)], "must be a dict of config patches"),
    ],
}


def cases(table: Mapping[str, list[tuple[object, object]]]) -> list[tuple[str, object, object]]:
    return [(name, value, result) for name, rows in table.items() for value, result in rows]


@pytest.mark.parametrize(("name", "value", "kept"), cases(GOOD))
def test_good_values(name, value, kept):
    assert getattr(AmberConfig(**{name: value}), name) == kept


@pytest.mark.parametrize(("name", "value", "message"), cases(BAD))
def test_bad_values(name, value, message):
    with pytest.raises(OptionError) as caught:
        AmberConfig(**{name: value})
    assert message in str(caught.value)


def test_every_option_is_in_both_tables():
    names = {option.name for option in fields(AmberConfig)}
    assert set(GOOD) == set(BAD) == names


def test_every_option_is_documented():
    documentation = str(AmberConfig.__doc__)
    for option in fields(AmberConfig):
        assert f"        {option.name}: " in documentation


def test_the_modes_are_inductors(inductor):
    assert set(MODES) == set(torch._inductor.list_mode_options())


def test_decode_needs_the_same_format():
    assert AmberConfig(quantize="int8", decode="int8").decode == "int8"
    with pytest.raises(OptionError, match="quantised to fp8; valid: None, or quantize='int8'"):
        AmberConfig(quantize="fp8", decode="int8")
    with pytest.raises(OptionError, match="check=True needs the weights that decode= releases"):
        AmberConfig(quantize="int8", decode="int8", check=True)


def test_a_plan_tells_the_format_that_decode_shares():
    quantized = Plan({"a": PlannedSite((8, 16), "why", Quantization("int8"))})
    assert AmberConfig(plan=quantized, decode="int8").decode == "int8"
    with pytest.raises(OptionError, match="quantised to int8; valid: None, or quantize='fp8'"):
        AmberConfig(plan=quantized, decode="fp8")
    with pytest.raises(OptionError, match="quantize='int8' contradicts plan="):
        AmberConfig(plan=quantized, quantize="int8")


# ---- what the options come to ----


def test_quantize_names_a_quantization():
    assert AmberConfig().quantization is None
    assert AmberConfig(quantize="fp8").quantization == Quantization("fp8")


def test_the_presets():
    assert AmberConfig().settings == Settings("2:4", "weight_norm", "norm")
    assert AmberConfig(preset="paper").settings == Settings("2:4", "robust_norm", None)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_option_replaces_what_the_preset_says(preset):
    chosen = AmberConfig(
        preset=preset, pattern="4:8", score="magnitude", correction="variance", dense_prefix=2
    )
    assert chosen.settings == Settings("4:8", "magnitude", "variance", 2)


def test_no_correction_is_not_the_same_as_no_answer():
    assert AmberConfig(correction=None).settings.correction is None
    assert AmberConfig().settings.correction == "norm"


# ---- plans ----


@pytest.mark.parametrize(
    "option",
    [
        {"preset": "paper"},
        {"pattern": "4:8"},
        {"score": "magnitude"},
        {"correction": None},
        {"correction": "norm"},
        {"projections": "*.q_proj"},
        {"projections": []},
        {"dense_prefix": 0},
    ],
)
def test_what_a_plan_decides_may_not_be_given_too(option):
    (name,) = option
    with pytest.raises(OptionError, match=rf"^{name}=.* contradicts plan=: the plan decides it"):
        AmberConfig(plan=PLAN, **option)


@pytest.mark.parametrize(
    "option",
    [
        {"skip": "*.q_proj"},
        {"min_tokens": 8},
        {"strict": True},
        {"check": True},
        {"mode": "max-autotune"},
        {"inductor": {"max_autotune": True}},
    ],
)
def test_what_goes_with_a_plan(option):
    assert AmberConfig(plan=PLAN, **option).plan == PLAN


@pytest.mark.parametrize("kind", [str, Path])
def test_a_plan_is_read_from_its_path(tmp_path, kind):
    PLAN.save(tmp_path / "llama.plan")
    assert AmberConfig(plan=kind(tmp_path / "llama.plan")).plan == PLAN


def test_a_path_without_a_plan(tmp_path):
    with pytest.raises(PlanError, match=r"nothing\.plan' cannot be read: No such file"):
        AmberConfig(plan=tmp_path / "nothing.plan")


# ---- options= and mode= of torch.compile ----


def test_from_options():
    assert AmberConfig.from_options(None, None) == AmberConfig()
    assert AmberConfig.from_options(None, {}) == AmberConfig()
    assert AmberConfig.from_options("max-autotune", None) == AmberConfig(mode="max-autotune")
    assert AmberConfig.from_options(None, {"mode": "max-autotune"}).mode == "max-autotune"
    given = {"pattern": "4:8", "skip": ["*.q_proj"]}
    assert AmberConfig.from_options(None, given) == AmberConfig(pattern="4:8", skip="*.q_proj")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("patern", "unknown option 'patern'; did you mean 'pattern'? valid: check, correction, "),
        ("max_autotune", "unknown option 'max_autotune'; valid: check"),
        ("settings", "unknown option 'settings'; valid: "),
        ("_settings", "unknown option '_settings'; valid: "),
        (3, "unknown option 3; valid: "),
    ],
)
def test_an_unknown_option(key, message):
    with pytest.raises(OptionError) as caught:
        AmberConfig.from_options(None, {key: True})
    assert message in str(caught.value)
    assert all(option.name in str(caught.value) for option in fields(AmberConfig))


@pytest.mark.parametrize("options", ["2:4", [("pattern", "2:4")], AmberConfig()])
def test_options_are_a_dict(options):
    with pytest.raises(OptionError, match=r"must be a dict; of an AmberConfig: vars\(config\)$"):
        AmberConfig.from_options(None, options)


EXAMPLES = [
    AmberConfig(),
    AmberConfig(pattern="4:8", score="magnitude", correction=None, projections=["*.q_proj"]),
    AmberConfig(plan=PLAN, skip="*.k_proj", inductor={"max_autotune": True}),
]


@pytest.mark.parametrize("config", EXAMPLES)
def test_vars_of_a_config_are_its_options(config):
    assert AmberConfig.from_options(None, vars(config)) == config
    assert set(vars(config)) == {option.name for option in fields(config)}


def test_torch_compile_takes_a_config_as_options():
    model = nn.Linear(16, 16)
    config = AmberConfig(pattern="4:8", score="magnitude", projections=["*"])
    with torch.no_grad():
        torch.compile(model, backend="amber_eager", options=vars(config))(torch.randn(2, 4, 16))


# ---- a value ----


def test_equal_options_are_equal_and_hash_alike():
    one = AmberConfig(pattern="2:4", projections=["*.q_proj"], inductor={"a": 1, "b": 2})
    same = AmberConfig(pattern=Pattern(2, 4), projections="*.q_proj", inductor={"b": 2, "a": 1})
    assert one == same
    assert hash(one) == hash(same)
    assert one != AmberConfig(pattern="2:4", projections=["*.q_proj"], inductor={"a": 1})
    assert len({AmberConfig(), AmberConfig(), AmberConfig(strict=True)}) == 2
    assert hash(AmberConfig(plan=PLAN)) == hash(AmberConfig(plan=Plan(PLAN.sites)))


def test_no_option_can_be_changed():
    with pytest.raises(FrozenInstanceError):
        AmberConfig().pattern = "4:8"


def test_what_the_caller_changes_later_has_no_effect():
    projections, patches = ["*.q_proj"], {"max_autotune": True}
    config = AmberConfig(projections=projections, inductor=patches)
    projections.append("*")
    patches["max_autotune"] = False
    assert config == AmberConfig(projections=["*.q_proj"], inductor={"max_autotune": True})


@pytest.mark.parametrize("config", EXAMPLES)
def test_copies(config):
    assert deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
